"""Drafts that are looked up: whose tokens are found, how many of them, and that answers are what they are without."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from manylora.engine import lookup
from manylora.engine.interface import AdapterRef, Mix, SamplingParams
from manylora.engine.lookup import LookupDrafter
from manylora.engine.sequence import Sequence
from tests.engine.harness import Rig, available_kernels, build_rig, load
from tests.tiny_adapters import make_adapter

EXACT = [kernel for kernel in available_kernels if kernel != "torch"]


def seq_of(
    prompt: list[int], *output: int, tenant: str = "t", adapter: str | None = None, salt: str | None = None
) -> Sequence:
    ref = AdapterRef(adapter, tenant, adapter, 1, adapter) if adapter else None
    seq = Sequence("r", list(prompt), SamplingParams(max_tokens=100), tenant=tenant, adapter=ref, cache_salt=salt)
    for token in output:
        seq.append(token)
    return seq


def ended(drafter: LookupDrafter, seq: Sequence) -> None:
    drafter.keep(seq)


def test_what_followed_in_the_prompt_is_proposed() -> None:
    drafter = LookupDrafter(most=3)
    seq = seq_of([1, 2, 3, 4, 5, 6, 7, 8], 90, 2, 3)
    assert drafter.propose(seq, 10, 1) == [4, 5, 6]
    seq.append(4)
    seq.append(5)
    assert drafter.propose(seq, 10, 1) == [6, 7, 8]
    assert drafter.propose(seq_of([1, 2, 3], 3, 9), 10, 1) == (), "one token alone is no match"


def test_the_longest_match_counts_and_of_equals_the_last() -> None:
    drafter = LookupDrafter(most=1)
    assert drafter.propose(seq_of([5, 1, 2, 7, 1, 2, 8, 5, 1, 2]), 9, 1) == [7]
    assert drafter.propose(seq_of([1, 2, 7, 1, 2, 8, 5, 1, 2]), 9, 1) == [8]


def test_what_an_answer_like_it_said_is_proposed_from_the_first_token_to_the_end() -> None:
    drafter = LookupDrafter(most=8)
    ended(drafter, seq_of([10, 11, 12, 13], 21, 22, 23, 0))
    assert drafter.propose(seq_of([30, 31, 12, 13]), 9, 1) == [21, 22, 23, 0]
    ended(drafter, seq_of([10, 11, 12, 13], 44, 45))
    assert drafter.propose(seq_of([30, 31, 12, 13], 21, 22), 9, 1) == [23, 0], "not what stands behind its end"


def test_weights_that_a_caller_makes_up_push_nobody_elses_answers_out() -> None:
    drafter = LookupDrafter(most=8)
    parts = [AdapterRef(name, "t", name, 1, name) for name in "ab"]
    ended(drafter, seq_of([10, 11], 21, 22, 23, tenant="u"))
    for number in range(lookup.MOST_KINDS + 1):
        mix = Mix.weighted([(parts[0], 1 + number / 10_000), (parts[1], 0.5)])
        ended(drafter, Sequence("r", [1, 2], SamplingParams(max_tokens=9), adapter=mix, tenant="t"))
    assert drafter.propose(seq_of([30], 21, 22, tenant="u"), 9, 1) == [23]


@pytest.mark.parametrize("other", [{"tenant": "u"}, {"adapter": "b"}, {"adapter": None}, {"salt": "s"}])
def test_nobody_elses_answers_are_looked_through(other: dict[str, str | None]) -> None:
    drafter = LookupDrafter(most=8)
    kind: dict[str, str | None] = {"tenant": "t", "adapter": "a", "salt": None}
    ended(drafter, seq_of([10, 11], 21, 22, 23, **kind))  # type: ignore[arg-type]
    assert drafter.propose(seq_of([30], 21, 22, **kind), 9, 1) == [23]  # type: ignore[arg-type]
    assert drafter.propose(seq_of([30], 21, 22, **{**kind, **other}), 9, 1) == ()  # type: ignore[arg-type]


def accepted(drafter: LookupDrafter, right: float, num_rows: int, seed: int = 1) -> int:
    """Length of the last draft after many of which each token was right with probability `right`."""
    chance, last = random.Random(seed), 0
    for _ in range(200):
        draft = drafter.propose(seq := seq_of(list(range(40)), 3, 4), 99, num_rows)
        last = len(draft)
        if draft:
            num_right = next((i for i in range(len(draft)) if chance.random() >= right), len(draft))
            drafter.learn(seq, len(draft), num_right)
    return last


def test_how_much_is_drafted_follows_what_was_accepted() -> None:
    assert accepted(LookupDrafter(most=15), 1.0, 1) == 15
    assert 2 <= accepted(LookupDrafter(most=15), 0.5, 1) <= 8
    assert accepted(LookupDrafter(most=15), 0.0, 1) <= 2
    assert accepted(LookupDrafter(most=15), 0.5, 64) == 0, "in a full batch a token costs what it is worth"
    accepted(drafter := LookupDrafter(most=15), 0.98, 1)
    assert accepted(drafter, 0.98, 64) >= 4
    assert accepted(LookupDrafter(most=15), 0.98, 32) >= 4


def test_who_is_looked_up_in_vain_is_left_alone_for_a_while() -> None:
    drafter, seq = LookupDrafter(most=4), seq_of([1, 2, 3])
    searches = 0
    for token in range(1000, 1200):
        seq.append(token)
        before = seq.drafting.num_followed if seq.drafting else 0
        assert drafter.propose(seq, 9, 1) == ()
        searches += seq.drafting.num_followed != before
    assert searches <= 12


def test_memory_is_bounded() -> None:
    drafter = LookupDrafter(most=4)
    for number in range(lookup.MOST_KINDS + 50):
        ended(drafter, seq_of([1], *range(50), adapter=f"a{number}"))
    assert len(drafter._kinds) == lookup.MOST_KINDS
    for _ in range(40):
        ended(drafter, seq_of([1], *range(1000)))
    assert all(each.text.num_tokens <= lookup.MEMORY for each in drafter._kinds.values())
    long = seq_of(list(range(50_000)))
    drafter.propose(long, 9, 1)
    assert long.drafting.text.num_tokens <= 2 * lookup.WINDOW


@pytest.fixture(scope="module")
def adapter(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_llama_dir, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(params=EXACT)
def rigs(request: pytest.FixtureRequest, tiny_llama_dir: Path, adapter: Path) -> Iterator[list[Rig]]:
    made = [
        build_rig(load(tiny_llama_dir), {"tuned": adapter}, num_blocks=300, kernel=request.param, drafter=drafter)
        for drafter in (None, LookupDrafter(most=15))
    ]
    yield made
    for rig in made:
        rig.close()


def test_answers_are_what_they_are_without_and_take_fewer_steps(rigs: list[Rig]) -> None:
    """A tiny model soon repeats itself, so much is found; the same prompts come again, greedy and by chance."""
    for rig in rigs:
        for number in range(12):
            name = "tuned" if number % 2 else None
            how: dict[str, Any] = {"temperature": 0.7, "seed": number % 6, "logprobs": 2} if number % 3 else {}
            prompt = [3 + number % 6, *range(30, 34 + number % 6)]
            rig.add(f"r{number}", prompt, name, max_tokens=40, **how)
            if number % 4 == 3:
                rig.run()
    plain, drafted = rigs
    for number in range(12):
        assert drafted.tokens(f"r{number}") == plain.tokens(f"r{number}")
    assert drafted.engine.num_steps < 0.8 * plain.engine.num_steps
    deltas = [output.delta for outputs in drafted.outputs.values() for output in outputs]
    assert 0 < sum(d.num_accepted for d in deltas) <= sum(d.num_drafted for d in deltas)
    assert all(d.num_accepted < len(d.token_ids) for d in deltas if d.num_drafted)


def test_drawn_tokens_have_the_models_distribution(rigs: list[Rig]) -> None:
    """Each place is drawn with its own random number, draft or not, so seeds by the hundred give the same tokens."""
    prompt = [7, 8, 9, 7, 8, 9, 7, 8]
    for rig in rigs:
        for seed in range(100):
            rig.add(f"s{seed}", prompt, None, max_tokens=4, temperature=1.5, seed=seed)
            if seed % 10 == 9:
                rig.run()
    plain, drafted = rigs
    assert [drafted.tokens(f"s{n}") for n in range(100)] == [plain.tokens(f"s{n}") for n in range(100)]
    assert len({tuple(plain.tokens(f"s{n}")) for n in range(100)}) > 50
