import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora_loadtest.popularity import POPULARITY_KINDS, Popularity, PopularityKind

kinds = st.sampled_from(POPULARITY_KINDS)


def _shares(popularity: Popularity, num_adapters: int, count: int = 40_000) -> np.ndarray:
    drawn = popularity.draw(num_adapters, count, np.random.default_rng(7))
    return np.bincount(drawn, minlength=num_adapters) / count


@given(kind=kinds, num_adapters=st.integers(1, 60), count=st.integers(0, 200), seed=st.integers(0, 2**32))
def test_every_draw_is_one_of_the_adapters(kind: PopularityKind, num_adapters: int, count: int, seed: int) -> None:
    drawn = Popularity(kind=kind).draw(num_adapters, count, np.random.default_rng(seed))
    assert drawn.shape == (count,)
    assert ((drawn >= 0) & (drawn < num_adapters)).all()


@given(kind=kinds, num_adapters=st.integers(1, 60), seed=st.integers(0, 2**32))
def test_same_seed_draws_the_same_adapters(kind: PopularityKind, num_adapters: int, seed: int) -> None:
    first, second = (Popularity(kind=kind).draw(num_adapters, 50, np.random.default_rng(seed)) for _ in range(2))
    assert (first == second).all()


@given(kind=kinds, num_adapters=st.integers(1, 60))
def test_weights_sum_to_one_and_never_rise_with_rank(kind: PopularityKind, num_adapters: int) -> None:
    weights = Popularity(kind=kind).weights(num_adapters)
    assert weights.sum() == pytest.approx(1)
    assert (np.diff(weights) <= 1e-12).all()


@pytest.mark.parametrize("kind", POPULARITY_KINDS)
def test_drawn_shares_follow_the_weights(kind: PopularityKind) -> None:
    popularity = Popularity(kind=kind)
    assert _shares(popularity, 20) == pytest.approx(popularity.weights(20), abs=0.01)


def test_zipf_halves_the_second_and_thirds_the_third() -> None:
    weights = Popularity(kind="zipf", s=1.0).weights(200)
    assert weights[0] / weights[1] == pytest.approx(2)
    assert weights[0] / weights[2] == pytest.approx(3)


def test_zipf_with_exponent_zero_is_uniform() -> None:
    assert Popularity(kind="zipf", s=0).weights(9) == pytest.approx(Popularity(kind="uniform").weights(9))


def test_one_hot_gives_the_first_adapter_its_share() -> None:
    assert Popularity(kind="one_hot", hot_share=0.7).weights(31) == pytest.approx([0.7] + [0.01] * 30)


def test_skewed_gives_a_tenth_of_the_adapters_nine_tenths() -> None:
    assert Popularity(kind="skewed").weights(50)[:5].sum() == pytest.approx(0.9)


def test_round_robin_goes_in_order() -> None:
    drawn = Popularity(kind="round_robin").draw(3, 7, np.random.default_rng(0))
    assert drawn.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_distinct_repeats_no_adapter_before_all_were_named() -> None:
    drawn = Popularity(kind="distinct").draw(10, 30, np.random.default_rng(0))
    passes = [sorted(drawn[i : i + 10].tolist()) for i in (0, 10, 20)]
    assert passes == [list(range(10))] * 3
    assert drawn[:10].tolist() != drawn[10:20].tolist()


def test_identical_names_one_adapter() -> None:
    assert set(Popularity(kind="identical").draw(10, 30, np.random.default_rng(0))) == {0}


def test_no_adapters_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one adapter"):
        Popularity().weights(0)
