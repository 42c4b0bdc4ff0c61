"""Uploaded patterns match as PEFT's do, and cannot hold the server up."""

import re
import sys
import time
from collections.abc import Callable
from types import FrameType, SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from manylora.lora.format.config import MAX_LAYERS_PATTERNS, MAX_NAMES, LoraSettings, parse
from manylora.lora.format.patterns import BUDGET_S, KeyTable, PatternFault, Patterns
from manylora.lora.format.problems import Problems
from manylora.lora.format.targets import as_accepted, resolve
from tests.lora.malformed import config, tiny_modules

MODULES = tiny_modules(layers=3)
PATHS = list(MODULES)
pieces = st.sampled_from(
    ["model", "layers", "0", "1", "2", "self_attn", "mlp", "q_proj", "v_proj", "_proj", ".", ".", r"\.", "-", "x"]
)
plain_keys = st.builds(
    lambda start, parts, end: start + "".join(parts) + end,
    st.sampled_from(["", "^"]),
    st.lists(pieces, min_size=1, max_size=7),
    st.sampled_from(["", "$"]),
)
whole_or_part = st.sampled_from(PATHS).flatmap(
    lambda path: st.integers(0, len(path) - 1).map(lambda start: path[start:])
)
expressions = st.sampled_from([r".*\.(q|k)_proj", r"layers\.[01]\..*", r"(?:mlp|self_attn)\.\w+", "lm_head|.*up_proj"])
names = st.sampled_from(
    ["q_proj", "v_proj", "mlp.up_proj", "embed_tokens", "lm_head", "layers.1.mlp.up_proj", *PATHS[:9]]
)


def settings_of(**changes: object) -> LoraSettings:
    problems = Problems()
    settings = parse(config(**changes), problems, [])
    assert settings is not None, problems.all()
    return settings


@given(plain_keys | whole_or_part | expressions, st.sampled_from(PATHS))
def test_pattern_key_means_what_peft_makes_of_it(key: str, path: str) -> None:
    assert (KeyTable([key], Patterns()).first(path) is not None) == (re.match(rf"(.*\.)?({key})$", path) is not None)


@given(st.lists(plain_keys | whole_or_part | expressions, max_size=4, unique=True))
def test_first_matching_pattern_key_wins_as_in_peft(keys: list[str]) -> None:
    table = {key: number for number, key in enumerate(keys, start=1)}
    settings = settings_of(r=50, target_modules=["q_proj", "up_proj", "lm_head"], rank_pattern=table)
    for path, target in (resolve(settings, MODULES, 64, Problems(), []) or {}).items():
        assert target.rank == table.get(get_pattern_key(keys, path), 50)


@given(
    st.lists(names, min_size=1, max_size=3) | expressions,
    st.none() | st.lists(names, max_size=2) | expressions,
    st.none() | st.lists(st.integers(0, 3), max_size=2) | st.integers(0, 2),
    st.none() | st.sampled_from(["layers", "h", ["h", "layers"], "l.*s"]),
)
def test_adapted_modules_are_those_that_peft_adapts(
    target: list[str] | str, exclude: list[str] | str | None, layers: list[int] | int | None, pattern: object
) -> None:
    if isinstance(target, str):
        layers = None
    if layers is None or layers == []:
        pattern = None
    changes = {
        "target_modules": target, "exclude_modules": exclude, "layers_to_transform": layers, "layers_pattern": pattern,
    }  # fmt: skip
    theirs = SimpleNamespace(**changes, modules_to_save=None, target_parameters=None)
    found = resolve(
        settings_of(**{**changes, "layers_pattern": pattern if layers != [] else None}), MODULES, 64, Problems(), []
    )
    assert list(found or {}) == [path for path in PATHS if check_target_module_exists(theirs, path)]


@pytest.mark.parametrize(
    "pattern",
    [
        r"(.|..)*(.|..)*\1\2[!?]", "(?:(?:a{999}){999}){999}", "a{1,99999}", "(?:foo){e<=2}", "a" * 9000,
        "(" * 2000 + "a" + ")" * 2000, "(unclosed", "*", r"\p{L}", "a{٣}",
        "[[:alpha:]_]*q_proj", "[^[:digit:]]+", "[:word:]+",
    ],
)  # fmt: skip
def test_costly_or_broken_pattern_is_a_fault(pattern: str) -> None:
    with pytest.raises(PatternFault):
        Patterns(budget_s=0.05).fullmatch(pattern, PATHS[1])


def test_budget_is_shared_by_all_patterns_of_an_adapter() -> None:
    patterns = Patterns(budget_s=0.05)
    with pytest.raises(PatternFault):
        patterns.fullmatch(r"(.|..)*(.|..)*\1\2[!?]", PATHS[1])
    with pytest.raises(PatternFault):
        patterns.fullmatch(r"(.|..)*(.|..)*\1\2[?!]", PATHS[1])


def test_length_of_all_patterns_together_is_bounded() -> None:
    patterns = Patterns()
    for number in range(16):
        assert not patterns.fullmatch(f"(?:{number}{'a' * 4000})", PATHS[1])
    with pytest.raises(PatternFault, match="too long"):
        patterns.fullmatch("b" * 4000, PATHS[1])


def test_one_pattern_per_module_as_eva_writes_them_is_accepted() -> None:
    modules = tiny_modules(layers=80)
    table = {path: 1 + number % 7 for number, path in enumerate(modules)}
    settings = settings_of(target_modules="all-linear", rank_pattern=table, alpha_pattern=table)
    targets = resolve(settings, modules, 64, Problems(), [])
    assert targets is not None
    assert all(target.rank == table[path] for path, target in targets.items())


HUGE_SET = "(?i)" + "[\u0100-\uffff]" * 1000


@pytest.mark.parametrize(
    "key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]
)
@pytest.mark.parametrize(
    "pattern",
    [
        HUGE_SET, "(?i)" + r"[\u0100-\uffff]" * 700, "(?i)" + r"[\U00010000-\U0010ffff]" * 300, "(a|aa)+" * 800 + "$",
        r"(.|..)*(.|..)*\1\2[!?]", "(?:" * 90 + "a" + "*)" * 90, "(.*)*" * 1000 + "x", "(?:a{1,9}){1,9}" * 300,
        "(?:(?=.*a)(?=.*b))" * 300, "|".join(f"a{n}" for n in range(1500)), "(?:.*?.*?.*?.*?){0,3}[!]" * 9,
    ],
)  # fmt: skip
def test_no_pattern_takes_longer_than_its_budget(key: str, pattern: str) -> None:
    change: dict[str, object] = {key: {pattern: 4} if key in ("rank_pattern", "alpha_pattern") else pattern}
    if key == "layers_pattern":
        change |= {"layers_to_transform": [0]}
    started = time.thread_time()
    resolve(settings_of(**change), tiny_modules(layers=8), 64, Problems(), [])
    assert time.thread_time() - started < 8 * BUDGET_S  # of this thread's own: what others do does not count


TABLES = {
    "tails": [f"m{n}.q_proj" for n in range(MAX_NAMES)],
    "dots": [f"x{n}.." for n in range(MAX_NAMES)],
    "own": [f"model.layers.{n // 7}.self_attn.q{n}_proj" for n in range(MAX_NAMES)],
    "same length": [f"{n:014b}".replace("1", ".").replace("0", "_") for n in range(2**14)],
    "expressions": [f"(x{n})" for n in range(3000)],
    "long expressions": [f"(x{n})" + "a*" * 90 for n in range(300)],
}


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("name", TABLES)
def test_tables_of_many_keys_are_read_in_proportion_or_refused(key: str, name: str) -> None:
    modules = {spec.path: spec for spec in tiny_modules(layers=40).values()}
    settings = settings_of(**{"target_modules": "all-linear", key: dict.fromkeys(TABLES[name], 4)})
    steps = steps_of(lambda: resolve(settings, modules, 64, Problems(), []))
    # Expressions are compiled, a hundred steps for each of their characters, unless another test has done so before.
    compiled = sum(map(len, TABLES[name])) if "expressions" in name else 0
    assert steps < 60 * (len(TABLES[name]) + 100 * len(modules) + 2 * compiled)


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_long_lists_of_names_are_read_in_proportion(key: str) -> None:
    modules = tiny_modules(layers=40)
    settings = settings_of(**{"target_modules": "all-linear", key: [f"x{n}_proj" for n in range(MAX_NAMES)]})
    problems = Problems()
    steps = steps_of(lambda: resolve(settings, modules, 64, problems, []))
    assert steps < 60 * (MAX_NAMES + 100 * len(modules))


def steps_of(work: Callable[[], object]) -> int:
    """How many lines of Python it runs: a measure of work that no other process moves."""
    count = 0

    def on_line(_frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal count
        count += event == "line"
        return on_line

    before = sys.gettrace()
    sys.settrace(on_line)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize(
    ("change", "most"),
    [
        ({"rank_pattern": {f"m{n}": 4 for n in range(50_000)}}, MAX_NAMES),
        ({"alpha_pattern": {f"m{n}": 4 for n in range(50_000)}}, MAX_NAMES),
        ({"target_modules": [f"m{n}" for n in range(50_000)]}, MAX_NAMES),
        ({"exclude_modules": [f"m{n}" for n in range(50_000)]}, MAX_NAMES),
        ({"layers_to_transform": list(range(50_000))}, MAX_NAMES),
        ({"layers_to_transform": [0], "layers_pattern": [f"h{n}" for n in range(17)]}, MAX_LAYERS_PATTERNS),
    ],
)  # fmt: skip
def test_every_count_in_a_config_is_bounded(change: dict[str, object], most: int) -> None:
    problems = Problems()
    assert parse(config(**change), problems, []) is None
    (problem,) = problems.all()
    assert problem.code == "bad_config"
    assert f"at most {most} are taken" in problem.message


@given(
    st.lists(names, min_size=1, max_size=3) | expressions,
    st.lists(plain_keys | whole_or_part | expressions, max_size=4, unique=True),
    st.lists(plain_keys | whole_or_part | expressions, max_size=4, unique=True),
    st.booleans(),
)
def test_what_was_accepted_is_found_again_by_its_tensors_alone(
    target: list[str] | str, rank_keys: list[str], alpha_keys: list[str], use_rslora: bool
) -> None:
    ranks = {key: number for number, key in enumerate(rank_keys, start=1)}
    alphas = {key: number for number, key in enumerate(alpha_keys, start=1)}
    settings = settings_of(target_modules=target, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=use_rslora)
    first = resolve(settings, MODULES, 64, Problems(), [])
    assert first is not None
    again = as_accepted(settings, MODULES, {path: found.rank for path, found in first.items()}, Problems())
    assert again == first
    assert list(again or {}) == list(first)


def test_an_accepted_adapter_is_read_again_without_running_what_chose_its_modules(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = settings_of(target_modules=r".*\.(q|v)_proj", exclude_modules=r".*lm_head", rank_pattern={"(q)_proj": 4})
    first = resolve(settings, MODULES, 64, Problems(), [])
    assert first
    monkeypatch.setattr(Patterns, "_run", lambda *_, **__: pytest.fail("a pattern is run at use"))
    assert as_accepted(settings, MODULES, {path: found.rank for path, found in first.items()}, Problems()) == first
