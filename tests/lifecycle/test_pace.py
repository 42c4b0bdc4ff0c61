import pytest

from manylora.lifecycle.progress import in_words
from manylora.lifecycle.train.training import Pace


def test_nothing_is_said_before_three_steps() -> None:
    assert Pace([9.0, 1.0], [100, 100]).remaining_s(1000, 0, 0) is None
    assert Pace([9.0, 1.0, 1.0], [100, 100, 100]).remaining_s(1000, 0, 0) is not None


def test_the_slow_first_step_does_not_count_and_long_steps_count_by_their_tokens() -> None:
    pace = Pace(step_s=[50.0, 1.0, 3.0], step_tokens=[100, 100, 300])

    assert pace.remaining_s(tokens_left=1000, evaluations_left=0, evaluation_tokens=0) == pytest.approx(10.0)


def test_evaluations_to_come_are_in_it_guessed_first_and_then_as_measured() -> None:
    pace = Pace(step_s=[1.0, 1.0, 1.0], step_tokens=[100, 100, 100])
    guessed = pace.remaining_s(tokens_left=0, evaluations_left=2, evaluation_tokens=400)
    pace.evaluation_s.append(7.0)

    assert guessed == pytest.approx(2 * 4.0 * 0.5)
    assert pace.remaining_s(tokens_left=0, evaluations_left=2, evaluation_tokens=400) == pytest.approx(14.0)


@pytest.mark.parametrize(("seconds", "words"), [(0.2, "1 s"), (59.0, "59 s"), (90.0, "1.5 min"), (7200.0, "2.0 h")])
def test_times_are_said_in_the_unit_that_fits(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
