"""Uploaded patterns match as PEFT's do, and cannot hold the server up."""

import re
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
from hypothesis import given
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from manylora.lora.patterns import PatternFault, Patterns
from manylora.lora.peft_config import LoraSettings, parse
from manylora.lora.problems import Problems
from manylora.lora.targets import resolve
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
    assert Patterns().names(key, path) == (re.match(rf"(.*\.)?({key})$", path) is not None)


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
