"""What tells the adapters of one request from those of another."""

from dataclasses import replace
from itertools import combinations

from manylora.identity import PUBLIC_TENANT, AdapterRef, Mix

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
