import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from manylora.lifecycle.evaluate.scores import (
    Outcomes,
    bootstrap,
    confusion,
    metric_value,
    outcomes,
    paired_test,
    per_class,
)

LABELS = ("bad", "good", "so")


def _said(golds: list[str], answers: list[str]) -> Outcomes:
    return outcomes(golds, answers, labels=LABELS)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from([*LABELS, "what?"])), min_size=1, max_size=40))
def test_label_metrics_are_scikit_learns(pairs: list[tuple[str, str]]) -> None:
    golds, answers = [g for g, _ in pairs], [a for _, a in pairs]
    found = _said(golds, answers)

    for name, score in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
        wanted = score(golds, answers, labels=sorted(set(golds)), average="macro", zero_division=0.0)
        assert metric_value(f"macro_{name}", found) == pytest.approx(wanted)
    assert metric_value("accuracy", found) == pytest.approx(accuracy_score(golds, answers))
    assert confusion(found).sum() == len(pairs)


def test_answer_around_a_label_is_no_prediction_but_mentions_it() -> None:
    found = _said(["good", "bad"], ["It is good, not bad.", "bad"])

    assert metric_value("accuracy", found) == 0.5
    assert metric_value("mentioned", found) == 1.0
    assert confusion(found).tolist() == [[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]


def test_precision_and_recall_of_each_label() -> None:
    table = per_class(_said(["good", "good", "bad", "so"], ["good", "bad", "bad", "?"]), LABELS)

    assert table["good"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2}
    assert table["bad"]["precision"] == 0.5
    assert table["so"]["recall"] == 0.0


def test_perplexity_weighs_tokens_and_not_examples() -> None:
    found = outcomes(["a", "b"], ["a", "x"], nll=[3.0, 1.0], tokens=[3, 1])

    assert metric_value("perplexity", found) == pytest.approx(math.e)


def test_json_counts_with_the_right_keys_in_order() -> None:
    gold = '{"a": 1, "b": null}'
    found = outcomes([gold] * 4, ['{"a": 2, "b": "x"}', '{"b": 1, "a": 1}', "{}", "no"])

    assert metric_value("valid_json", found) == 0.25


def test_bootstrap_interval_is_the_binomial_one() -> None:
    random = np.random.default_rng(0)
    answers = ["good" if hit else "bad" for hit in random.random(400) < 0.7]

    interval = bootstrap("accuracy", _said(["good"] * 400, answers), seed=1)

    spread = 1.96 * math.sqrt(interval.value * (1 - interval.value) / 400)
    assert interval.low == pytest.approx(interval.value - spread, abs=0.01)
    assert interval.high == pytest.approx(interval.value + spread, abs=0.01)


@pytest.mark.parametrize(("better", "worse", "is_significant"), [(80, 50, True), (52, 50, False)])
def test_paired_test_tells_a_difference_from_chance(better: int, worse: int, is_significant: bool) -> None:
    golds = ["good"] * 100
    one = _said(golds, ["good"] * worse + ["bad"] * (100 - worse))
    two = _said(golds, ["good"] * better + ["bad"] * (100 - better))

    test = paired_test("accuracy", one, two, seed=0)

    assert test.gain == pytest.approx((better - worse) / 100)
    assert (test.p < 0.05) is is_significant


def test_equal_systems_have_no_gain_and_lower_perplexity_is_one() -> None:
    golds = ["good"] * 30
    one = outcomes(golds, golds, labels=LABELS, nll=[2.0] * 30, tokens=[1] * 30)
    two = outcomes(golds, golds, labels=LABELS, nll=[1.0] * 30, tokens=[1] * 30)

    assert paired_test("accuracy", one, two, seed=0).p == 1.0
    assert paired_test("perplexity", one, two, seed=0).gain > 0
