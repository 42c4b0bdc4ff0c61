"""What tells the adapters of one request from those of another."""

import random
from dataclasses import replace
from itertools import combinations

import pytest

from manylora.identity import NEVER, PUBLIC_TENANT, AdapterRef, Mix

A = AdapterRef("version_a", "acme", "a", 1, "d")
B = AdapterRef("version_b", PUBLIC_TENANT, "b", 1, "d")


def test_a_mix_is_known_by_its_adapters_and_weights_in_any_order() -> None:
    assert Mix(((A, 0.5), (B, 1.0))).key == Mix(((B, 1.0), (A, 0.5))).key
    others = [
        Mix(), Mix.of(A), Mix.of(B), Mix(((A, 0.5),)), Mix(((A, -1.0),)), Mix(((A, 1.0), (B, 1.0))),
        Mix(((A, 0.5), (B, 1.0))), Mix(((A, 1.0), (B, 0.5))), Mix.of(replace(A, id="version_a', 1.0), ('version_b")),
    ]  # fmt: skip
    assert all(one.key != other.key for one, other in combinations(others, 2))


def test_a_name_or_tenant_does_not_make_another_mix_and_an_id_does() -> None:
    assert Mix.of(replace(A, name="renamed")).key == Mix.of(A).key
    assert Mix.of(replace(A, id="version_c")).key != Mix.of(A).key


def test_a_mix_is_public_if_all_of_it_is() -> None:
    assert Mix.of(None).is_public
    assert Mix.of(B).is_public
    assert not Mix.of(A).is_public
    assert not Mix(((A, 0.5), (B, 0.5))).is_public


def test_what_steps_tell_mixes_apart_by_is_made_once() -> None:
    mix = Mix(((A, 0.5), (B, 1.0)))
    assert mix.refs == (A, B)
    assert mix.ids == (A.id, B.id)
    assert mix.key is mix.key
    assert mix.refs is mix.refs


class Counted(int):
    """A token that counts how often it is compared."""

    num_compared = 0

    def __eq__(self, other: object) -> bool:
        Counted.num_compared += 1
        return int(self) == other

    def __ne__(self, other: object) -> bool:
        Counted.num_compared += 1
        return int(self) != other

    __hash__ = int.__hash__


def acts_from(invocation: list[int], prompt: list[int]) -> int:
    return replace(A, invocation=tuple(invocation)).acts_from(prompt)


def test_an_adapter_acts_from_its_last_invocation_on() -> None:
    assert acts_from([], [1, 2]) == 0
    assert [acts_from([1, 2], prompt) for prompt in ([], [1], [2, 1], [1, 2], [1, 2, 3, 1, 2])] == [
        NEVER, NEVER, NEVER, 0, 3
    ]  # fmt: skip
    rng = random.Random(0)
    for _ in range(500):
        prompt, wanted = (rng.choices((1, 2), k=rng.randint(least, 12)) for least in (0, 1))
        places = [at for at in range(len(prompt)) if prompt[at : at + len(wanted)] == wanted]
        assert acts_from(wanted, prompt) == (places[-1] if places else NEVER)


@pytest.mark.parametrize("wanted", [[6, *[5] * 63], [*[5] * 63, 6], [*[5] * 32, 6, *[5] * 31]])
def test_a_prompt_that_nearly_invokes_it_everywhere_costs_no_more_than_another(wanted: list[int]) -> None:
    Counted.num_compared = 0
    assert acts_from(wanted, [Counted(5)] * 4000) == NEVER
    assert Counted.num_compared <= 4 * 4000
