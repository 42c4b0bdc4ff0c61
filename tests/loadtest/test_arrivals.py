from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from manylora_loadtest.arrivals import Arrival


def _times(seed: int = 11, **fields: Any) -> np.ndarray:
    return Arrival.model_validate(fields).times(0, np.random.default_rng(seed))


def _gap_variation(times: np.ndarray) -> float:
    gaps = np.diff(times, prepend=0.0)
    return float(gaps.std() / gaps.mean())


def test_poisson_has_its_rate_and_exponential_gaps() -> None:
    times = _times(process="poisson", rate=50, duration_s=400)
    assert len(times) / 400 == pytest.approx(50, rel=0.02)
    assert _gap_variation(times) == pytest.approx(1, abs=0.03)


def test_poisson_counts_vary_as_much_as_their_mean() -> None:
    times = _times(process="poisson", rate=20, duration_s=1000)
    counts, _ = np.histogram(times, np.arange(0, 1001))
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_gaps_vary_by_burstiness_and_keep_the_rate(burstiness: float) -> None:
    times = _times(process="gamma", burstiness=burstiness, rate=50, duration_s=800)
    assert len(times) / 800 == pytest.approx(50, rel=0.03)
    assert _gap_variation(times) == pytest.approx(burstiness**-0.5, rel=0.05)


def test_constant_arrivals_are_equally_spaced() -> None:
    assert _times(process="constant", rate=4, requests=3) == pytest.approx([0.25, 0.5, 0.75])


def test_same_seed_gives_the_same_times_and_another_seed_others() -> None:
    first, second, other = (_times(seed, process="poisson", rate=5, duration_s=20) for seed in (1, 1, 2))
    assert first.tolist() == second.tolist()
    assert first.tolist() != other.tolist()


def test_no_arrival_is_after_the_duration() -> None:
    times = _times(process="gamma", burstiness=0.1, rate=10, duration_s=30)
    assert (np.diff(times) >= 0).all()
    assert times[-1] < 30


def test_requests_bound_the_number_of_arrivals() -> None:
    assert len(_times(process="poisson", rate=10, duration_s=1000, requests=12)) == 12


@pytest.mark.parametrize(
    "fields",
    [
        {"process": "poisson", "duration_s": 5},
        {"process": "poisson", "rate": 1},
        {"process": "poisson", "rate": 0, "duration_s": 5},
        {"process": "poisson", "rate": 1, "duration_s": 5, "burstiness": 2},
        {"process": "closed", "requests": 5},
        {"process": "closed", "concurrency": 2},
        {"process": "closed", "concurrency": 2, "requests": 5, "rate": 1},
        {"process": "closed", "concurrency": 2, "requests": 5, "max_in_flight": 1},
        {"process": "poisson", "rate": 1, "duration_s": 5, "concurrency": 3},
    ],
)
def test_arrivals_that_make_no_sense_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Arrival.model_validate(fields)
