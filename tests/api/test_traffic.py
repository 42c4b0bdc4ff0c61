"""The recent traffic in memory: rates, percentiles, bounds."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.api.record import Counts, RequestRecord
from manylora.api.traffic import LATENCY_WINDOW_S, RATE_WINDOW_S, Traffic, percentiles
from manylora.engine.interface import AdapterRef, RequestTiming, Tier
from manylora.errors import InvalidRequest, QueueFull

from .fakes import make_ref


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def on_device(ref: AdapterRef) -> Tier:
    return "device"


def finish(traffic: Traffic, *, tenant: str = "acme", adapter: AdapterRef | None = None, ttft_s: float = 0.1) -> None:
    counts = Counts(arrived=0.0, first_token=ttft_s)
    counts.timings.append(RequestTiming(queue_ms=1, load_ms=0, load_tier="device", ttft_ms=1))
    traffic.begin(tenant)
    traffic.end(counts.frozen(None, request_id="r", tenant=tenant, adapter=adapter))


def ended(error: Exception | None) -> RequestRecord:
    return Counts().frozen(error, request_id="r", tenant="acme")


def test_the_rate_counts_whole_seconds_of_the_window() -> None:
    clock = Clock()
    traffic = Traffic(clock)
    for second in range(30):
        clock.now = 1000.0 + second
        traffic.tick(("acme", None), 7, clock.now)
    clock.now += 0.9
    rates = traffic.view("acme", on_device)["rates"]
    assert rates["completion_tokens_per_s"] == 7.0
    clock.now += RATE_WINDOW_S + 1
    assert traffic.view("acme", on_device)["rates"]["completion_tokens_per_s"] == 0


def test_the_rates_of_tenants_add_up_to_the_total() -> None:
    clock = Clock()
    traffic = Traffic(clock)
    traffic.tick(("acme", None), 30, clock.now)
    traffic.tick(("rival", None), 10, clock.now)
    clock.now += 2
    rates = [traffic.view(t, on_device)["rates"]["completion_tokens_per_s"] for t in ("acme", "rival", None)]
    assert rates == [15.0, 5.0, 20.0]


def test_in_flight_is_what_has_begun_and_not_ended() -> None:
    traffic = Traffic()
    for _ in range(3):
        traffic.begin("acme")
    traffic.end(ended(None))
    assert traffic.view("acme", on_device)["in_flight"] == 2
    assert traffic.view("rival", on_device)["in_flight"] == 0


def test_percentiles_forget_what_is_older_than_the_window() -> None:
    clock = Clock()
    traffic = Traffic(clock)
    finish(traffic, ttft_s=9.0)
    clock.now += LATENCY_WINDOW_S + 1
    finish(traffic, ttft_s=0.5)
    assert traffic.view(None, on_device)["latency"]["ttft_ms"] == {"p50": 500.0, "p95": 500.0, "p99": 500.0}


def test_rows_are_by_version_and_the_newest_use_comes_first() -> None:
    traffic = Traffic()
    for ref in (make_ref("alpha", 1), make_ref("alpha", 2), make_ref("alpha", 1)):
        finish(traffic, adapter=ref)
    rows = traffic.view(None, on_device)["adapters"]
    assert [(r["name"], r["version"], r["requests"]) for r in rows] == [("alpha", 1, 2), ("alpha", 2, 1)]


def test_memory_is_bounded_over_many_adapters() -> None:
    traffic = Traffic()
    for number in range(5000):
        finish(traffic, adapter=make_ref(f"a{number}"))
    view = traffic.view(None, on_device)
    assert view["totals"]["requests"] == 5000
    assert len(view["adapters"]) == 1024


def test_refusals_of_the_server_are_listed_and_the_callers_mistakes_are_not() -> None:
    traffic = Traffic()
    for error in (QueueFull("full"), ValueError("x")):
        traffic.begin("acme")
        traffic.end(ended(error))
    view = traffic.view("acme", on_device)
    assert [e["code"] for e in view["recent_errors"]] == ["queue_full"]
    assert view["totals"]["outcomes"] == {"rejected": 1, "error": 1}


def test_the_callers_mistakes_are_a_list_of_their_own() -> None:
    traffic = Traffic()
    for tenant in ("acme", "rival"):
        traffic.begin(tenant)
        traffic.end(Counts().frozen(InvalidRequest("no"), request_id=tenant, tenant=tenant))
    assert traffic.view(None, on_device)["recent_errors"] == []
    assert [e["request_id"] for e in traffic.client_errors(None)] == ["rival", "acme"]
    assert [e["request_id"] for e in traffic.client_errors("acme")] == ["acme"]


@given(st.lists(st.floats(min_value=0, max_value=100), min_size=1, max_size=300))
def test_percentiles_are_values_that_were_seen(values: list[float]) -> None:
    found = percentiles(values)
    seen = {round(v * 1000, 3) for v in values}
    p50, p95, p99 = (found[p] for p in ("p50", "p95", "p99"))
    assert p50 is not None
    assert p95 is not None
    assert p99 is not None
    assert {p50, p95, p99} <= seen
    assert p50 <= p95 <= p99
    assert sum(v * 1000 <= p95 + 0.001 for v in values) >= 0.95 * len(values)


def test_gaps_are_between_the_tokens_of_one_choice() -> None:
    counts = Counts(arrived=0.0)
    for choice, num_tokens, now in [(0, 1, 1.0), (1, 1, 1.0), (0, 1, 1.5), (1, 2, 3.0), (1, 0, 9.0)]:
        counts.add_tokens(choice, num_tokens, now)
    finished = counts.frozen(None, request_id="r", tenant="acme")
    assert finished.gaps_s == (0.5, 1.0, 1.0)
    assert finished.ttft_s == 1.0
    assert finished.completion_tokens == 5
    assert finished.tpot_s == pytest.approx(2.5 / 3)


def test_the_slowest_prompt_gives_the_times() -> None:
    counts = Counts()
    counts.timings = [
        RequestTiming(1, 9, "host", 20),
        RequestTiming(5, 2, "disk", 10),
        RequestTiming(3, 3, "device", 1),
    ]
    assert counts.timing() == RequestTiming(5, 9, "disk", 20)
