"""The reader of server-sent events, and the figures drawn from results."""

import itertools
import math

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora_loadtest.results import RequestResult
from manylora_loadtest.stream import StreamReader
from manylora_loadtest.summary import jain_index, meets, statistics
from manylora_loadtest.thresholds import Slo, Thresholds

STREAM = b"".join(
    [
        b": a comment\n\n",
        b'data: {"choices": [{"index": 0, "text": "one"}]}\n\n',
        'data: {"choices": [{"index": 0, "text": "zwölf"}]}\r\n\r\n'.encode(),
        b'data:{"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}\n\n',
        b'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}\n\n',
        b"data: [DONE]\n\n",
    ]
)


def _result(**fields: object) -> RequestResult:
    result = RequestResult(0, 0, "default", None, False, 1, 1, 0.0)
    for name, value in fields.items():
        setattr(result, name, value)
    return result


@given(cuts=st.lists(st.integers(0, len(STREAM)), max_size=30))
def test_stream_reads_the_same_however_it_is_cut(cuts: list[int]) -> None:
    result = _result()
    reader = StreamReader(result)
    places = [0, *sorted(cuts), len(STREAM)]
    for start, end in itertools.pairwise(places):
        reader.feed(STREAM[start:end], 1.0)
    reader.end()
    assert (result.outcome, result.num_events, result.prompt_tokens, result.output_tokens) == ("ok", 2, 9, 2)


def test_answer_without_any_text_still_has_a_first_token() -> None:
    result = _result()
    reader = StreamReader(result)
    reader.feed(b'data: {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n', 3.0)
    reader.end()
    assert (result.outcome, result.first_s) == ("ok", 3.0)


@pytest.mark.parametrize("payload", [b"{", b"[]", b'{"choices": [3]}', b'{"usage": {"prompt_tokens": 1}}'])
def test_event_that_is_not_openais_is_a_bad_answer(payload: bytes) -> None:
    result = _result()
    reader = StreamReader(result)
    reader.feed(b"data: " + payload + b"\n\n" + STREAM, 1.0)
    reader.end()
    assert result.outcome == "bad_answer"


def test_times_are_stamped_when_events_arrive() -> None:
    result = _result(due_s=0.5)
    reader = StreamReader(result)
    for now_s, text in ((1.0, "a"), (1.25, "b"), (2.0, "c")):
        reader.feed(b"data: " + orjson.dumps({"choices": [{"text": text}]}) + b"\n\n", now_s)
    result.output_tokens = 3
    assert (result.ttft_s, result.tpot_s, result.max_gap_s) == (0.5, 0.5, 0.75)


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=20))
def test_jain_index_is_between_one_over_n_and_one(shares: list[float]) -> None:
    assert 1 / len(shares) - 1e-9 <= jain_index(shares) <= 1 + 1e-9


def test_jain_index_knows_equal_and_starved() -> None:
    assert jain_index([0.3, 0.3, 0.3]) == pytest.approx(1)
    assert jain_index([1, 0, 0, 0]) == pytest.approx(0.25)
    assert jain_index([0, 0]) == 0


def test_statistics_are_percentiles_of_the_values() -> None:
    values = statistics([float(n) for n in range(101)])
    assert (values["p50"], values["p95"], values["p99"], values["max"], values["mean"]) == (50, 95, 99, 100, 50)
    assert statistics([]) == {}


def test_every_limit_of_the_objective_must_hold() -> None:
    result = _result(outcome="ok", first_s=0.2, last_s=0.4, end_s=0.5, output_tokens=3)
    assert meets(result, Slo(ttft_ms=201, tpot_ms=101, e2e_ms=501))
    assert not meets(result, Slo(ttft_ms=199, tpot_ms=101))
    assert not meets(result, Slo(tpot_ms=99))
    assert not meets(_result(outcome="http_500"), Slo())


def test_figure_that_was_not_measured_fails_its_threshold() -> None:
    (result,) = Thresholds({"ttft_p95_ms": 10}).check({"ttft_p95_ms": None})
    assert not result.is_passed


def test_limit_itself_passes_in_both_directions() -> None:
    results = Thresholds({"error_rate": 0.5, "goodput_rps": 2}).check({"error_rate": 0.5, "goodput_rps": 2})
    assert [(result.is_upper, result.is_passed) for result in results] == [(True, True), (False, True)]


def test_ratio_against_a_starved_tenant_fails_any_limit() -> None:
    (result,) = Thresholds({"share_ratio": 1e9}).check({"share_ratio": math.inf})
    assert not result.is_passed
