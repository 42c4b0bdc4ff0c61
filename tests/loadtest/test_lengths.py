from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from manylora_loadtest.lengths import Length, LengthKind, Lengths


def _draw(**fields: Any) -> np.ndarray:
    return Length(**fields).draw(20_000, np.random.default_rng(3))


@given(
    kind=st.sampled_from(["constant", "uniform", "normal", "lognormal", "exponential"]),
    low=st.integers(1, 100),
    width=st.integers(0, 100),
    seed=st.integers(0, 2**32),
)
def test_every_length_is_within_its_bounds(kind: LengthKind, low: int, width: int, seed: int) -> None:
    drawn = Length(kind=kind, low=low, high=low + width).draw(40, np.random.default_rng(seed))
    assert ((drawn >= low) & (drawn <= low + width)).all()


def test_plain_integer_is_a_constant_length() -> None:
    length = TypeAdapter(Lengths).validate_python(77)
    assert set(length.draw(5, np.random.default_rng(0))) == {77}


def test_uniform_reaches_both_ends() -> None:
    drawn = _draw(kind="uniform", low=4, high=8)
    assert np.bincount(drawn)[4:] / len(drawn) == pytest.approx([0.2] * 5, abs=0.02)


def test_normal_has_its_mean_and_deviation() -> None:
    drawn = _draw(kind="normal", mean=200, std=20)
    assert (drawn.mean(), drawn.std()) == (pytest.approx(200, rel=0.01), pytest.approx(20, rel=0.05))


def test_lognormal_has_its_median_and_sigma() -> None:
    drawn = _draw(kind="lognormal", median=300, sigma=0.5)
    assert np.median(drawn) == pytest.approx(300, rel=0.03)
    assert np.log(drawn).std() == pytest.approx(0.5, rel=0.03)


def test_exponential_has_its_mean() -> None:
    assert _draw(kind="exponential", mean=500).mean() == pytest.approx(500, rel=0.03)


def test_choice_draws_the_values_by_weight() -> None:
    drawn = _draw(kind="choice", values=(16, 512), weights=(3, 1))
    assert set(drawn) == {16, 512}
    assert (drawn == 16).mean() == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "uniform", "low": 4},
        {"kind": "choice"},
        {"kind": "choice", "values": (1, 2), "weights": (1,)},
        {"kind": "choice", "values": (1, 2), "weights": (0, 0)},
        {"low": 9, "high": 8},
        {"kind": "constant", "value": 0},
        {"kind": "constant", "lenght": 4},
    ],
)
def test_inconsistent_length_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Length.model_validate(fields)
