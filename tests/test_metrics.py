"""The metrics: every one of the contract, bounded labels, counters that only grow."""

from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from manylora.api.record import RequestRecord
from manylora.engine.interface import AdapterRef, EngineStats, RequestTiming
from manylora.metric_labels import BusiestNames
from manylora.metrics import (
    BASE_LABEL,
    BUCKETS,
    OTHER_LABEL,
    OUTCOMES,
    Metrics,
    NoMetrics,
)

CONTRACT = {
    "histogram": "request_duration_seconds time_to_first_token_seconds inter_token_latency_seconds "
    "queue_wait_seconds adapter_load_seconds step_duration_seconds",
    "counter": "requests prompt_tokens completion_tokens prefix_cache_hit_tokens adapter_requests_by_tier "
    "adapter_evictions preemptions uploads",
    "gauge": "requests_running requests_waiting requests_waiting_for_adapter kv_blocks_used kv_blocks_total "
    "adapter_slots_used adapter_slots_total host_tier_bytes",
}
# What alerts and dashboards want beyond it.
MORE = {
    "histogram": "grammar_compile_seconds canary_time_to_first_token_seconds",
    "counter": "adapter_load_failures adapter_not_finite engine_step_failures adapter_files_damaged connections_ended "
    "quota_fallback structured_requests drafted_tokens accepted_draft_tokens sound_seconds fine_tuning_published "
    "canary_requests http_requests state_snapshot_hits",
    "gauge": "engine_ready device_tier_bytes adapter_orphans fine_tuning_jobs fine_tuning_workers "
    "state_snapshots_used state_snapshots_total state_snapshot_bytes",
}


def always() -> bool:
    return True


def names_of(*groups: dict[str, str]) -> dict[str, str]:
    return {f"manylora_{name}": kind for group in groups for kind, names in group.items() for name in names.split()}


def sample(tenant: str = "acme", adapter: str | None = "a", outcome: str = "ok", tokens: int = 3) -> RequestRecord:
    return RequestRecord(
        request_id="r",
        tenant=tenant,
        adapter=AdapterRef("v1", tenant, adapter, 1, "d") if adapter else None,
        outcome=outcome,
        finished_at=0.0,
        duration_s=1.5,
        ttft_s=0.25,
        timing=RequestTiming(queue_ms=10, load_ms=0, load_tier="host", ttft_ms=250),
        prompt_tokens=5,
        completion_tokens=tokens,
        cached_tokens=2,
        gaps_s=(0.1, 0.2),
    )


def totals(metrics: Metrics, name: str) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], float] = defaultdict(float)
    for family in text_string_to_metric_families(metrics.render().decode()):
        for s in family.samples:
            if s.name == f"manylora_{name}":
                found[s.labels["tenant"], s.labels["adapter"]] += s.value
    return found


def test_every_metric_of_the_contract_is_there_with_its_type() -> None:
    metrics = Metrics()
    metrics.watch_engine(EngineStats, always)
    metrics.observe_request(sample())
    families = {f.name: f.type for f in text_string_to_metric_families(metrics.render().decode())}
    ours = {name: kind for name, kind in families.items() if name.startswith("manylora_")}
    assert ours == names_of(CONTRACT, MORE)
    assert families["process_start_time_seconds"] == families["process_resident_memory_bytes"] == "gauge"


def test_the_buckets_span_a_millisecond_to_a_minute() -> None:
    assert (BUCKETS[0], BUCKETS[-1]) == (0.001, 60.0)
    assert sorted(BUCKETS) == list(BUCKETS)


def test_gauges_are_read_when_scraped() -> None:
    metrics = Metrics()
    stats = [EngineStats(running=1), EngineStats(running=2, slots_total=9, host_tier_bytes=7)]
    metrics.watch_engine(lambda: stats[0], always)
    assert b"manylora_requests_running 1.0" in metrics.render()
    stats.pop(0)
    text = metrics.render()
    assert b"manylora_requests_running 2.0" in text
    assert b"manylora_adapter_slots_total 9.0" in text
    assert b"manylora_host_tier_bytes 7.0" in text


def test_what_the_engine_and_the_catalog_record() -> None:
    metrics = Metrics()
    metrics.observe_step("forward", 0.02)
    metrics.observe_adapter_load("acme", "a", "disk", 0.5)
    metrics.count_load_failure("acme", "broken")
    metrics.count_eviction("acme", "a", "device")
    metrics.count_upload("acme", "refused")
    text = metrics.render().decode()
    assert 'manylora_step_duration_seconds_bucket{le="0.025",phase="forward"} 1.0' in text
    assert 'manylora_step_duration_seconds_bucket{le="0.01",phase="forward"} 0.0' in text
    assert 'manylora_adapter_load_seconds_sum{adapter="a",tenant="acme",tier="disk"} 0.5' in text
    assert 'manylora_adapter_load_failures_total{adapter="broken",tenant="acme"} 1.0' in text
    assert 'manylora_adapter_evictions_total{adapter="a",tenant="acme",tier="device"} 1.0' in text
    assert 'manylora_uploads_total{result="refused",tenant="acme"} 1.0' in text


def test_an_engine_that_has_died_is_seen_at_the_next_scrape() -> None:
    metrics = Metrics()
    is_ready = [True]
    metrics.watch_engine(EngineStats, lambda: is_ready[0])
    assert b"manylora_engine_ready 1.0" in metrics.render()
    is_ready[0] = False
    assert b"manylora_engine_ready 0.0" in metrics.render()


def test_adapters_that_are_loaded_and_evicted_have_bounded_labels_and_exact_sums() -> None:
    metrics = Metrics(free_labels=8, reserve_labels=4)
    for number in range(1000):
        metrics.observe_adapter_load(f"t{number % 50}", f"a{number}", "disk", 0.1)
        metrics.count_eviction(f"t{number % 50}", f"a{number}", "device")
    for name in ("adapter_load_seconds_count", "adapter_evictions_total"):
        found = totals(metrics, name)
        assert sum(found.values()) == 1000
        assert len({adapter for _, adapter in found}) <= 13
        assert len({tenant for tenant, _ in found}) <= 13


def test_loads_do_not_take_the_labels_of_those_who_ask() -> None:
    metrics = Metrics(free_labels=1, reserve_labels=0)
    metrics.observe_adapter_load("public", "a", "disk", 0.1)
    metrics.observe_request(sample("acme", "b"))
    assert totals(metrics, "requests_total") == {("acme", "b"): 1}


def test_loader_threads_lose_no_count() -> None:
    metrics = Metrics(free_labels=4, reserve_labels=4)

    def load(thread: int) -> None:
        for number in range(2000):
            metrics.count_eviction("acme", f"a{thread * number % 97}", "host")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(load, range(8)))
    assert sum(totals(metrics, "adapter_evictions_total").values()) == 16000


def test_with_metrics_off_nothing_is_counted() -> None:
    metrics = NoMetrics()
    metrics.observe_request(sample())
    metrics.observe_step("forward", 1.0)
    metrics.observe_adapter_load("acme", "a", "disk", 0.1)
    metrics.count_load_failure("acme", "a")
    metrics.count_eviction("acme", "a", "device")
    metrics.count_upload("acme", "created")
    metrics.count_damaged()
    metrics.show_orphans(3)
    families = text_string_to_metric_families(metrics.render().decode())
    assert not any(sample.name.startswith("manylora_") and sample.value for f in families for sample in f.samples)


def test_the_base_has_a_label_that_no_adapter_can_have() -> None:
    metrics = Metrics()
    metrics.observe_request(sample(adapter=None))
    metrics.observe_request(sample(adapter="base"))
    assert totals(metrics, "requests_total") == {("acme", BASE_LABEL): 1, ("acme", "base"): 1}
    assert "adapter_requests_by_tier_total{" in metrics.render().decode()
    assert totals(metrics, "adapter_requests_by_tier_total") == {("acme", "base"): 1}


def test_a_request_that_never_started_has_no_latencies() -> None:
    metrics = Metrics()
    metrics.observe_request(RequestRecord("r", "acme", None, "rejected", finished_at=0.0, duration_s=0.01))
    assert totals(metrics, "requests_total") == {("acme", BASE_LABEL): 1}
    assert totals(metrics, "time_to_first_token_seconds_count") == {("acme", BASE_LABEL): 0}


def test_a_thousand_adapters_have_bounded_labels_and_exact_sums() -> None:
    metrics = Metrics(free_labels=8, reserve_labels=4)
    for number in range(1000):
        metrics.observe_request(sample(tenant=f"t{number % 50}", adapter=f"a{number}"))
    found = totals(metrics, "completion_tokens_total")
    assert sum(found.values()) == 3000
    assert len({adapter for _, adapter in found}) <= 13
    assert len({tenant for tenant, _ in found}) <= 13
    assert ("t0", "a0") in found
    assert (OTHER_LABEL, OTHER_LABEL) in found


def test_a_newcomer_that_becomes_busier_gets_a_label() -> None:
    metrics = Metrics(free_labels=2, reserve_labels=1)
    for name in ("a", "b", "b", "b"):
        metrics.observe_request(sample(adapter=name))
    for _ in range(5):
        metrics.observe_request(sample(adapter="late"))
    found = totals(metrics, "requests_total")
    assert found["acme", OTHER_LABEL] == 1, "until it was seen more often than 'a'"
    assert found["acme", "late"] == 4


def test_names_seen_once_each_never_push_in() -> None:
    names = BusiestNames(free=2, reserve=4)
    for name in ("a", "b") * 3:
        assert names.see(name)
    assert not any(names.see(f"stranger-{i}") for i in range(500))


@given(st.lists(st.integers(0, 30), max_size=400), st.integers(0, 4), st.integers(0, 4))
def test_labels_are_few_and_kept_for_ever(uses: list[int], free: int, reserve: int) -> None:
    names = BusiestNames(free, reserve)
    labelled: set[int] = set()
    seen: Counter[int] = Counter()
    for name in uses:
        seen[name] += 1
        had = name in labelled
        has = names.see(name)
        names.check_integrity()
        assert has or not had, "a label is never taken back"
        if has:
            labelled.add(name)
    assert len(labelled) == len(names) <= free + reserve
    assert len(labelled) >= min(free, len(seen))


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_outcomes_are_told_apart_and_all_there_from_the_start(outcome: str) -> None:
    metrics = Metrics()
    metrics.observe_request(sample(outcome=outcome))
    text = metrics.render().decode()
    for each in OUTCOMES:
        count = float(each == outcome)
        assert f'manylora_requests_total{{adapter="a",outcome="{each}",tenant="acme"}} {count}' in text


def test_paths_and_methods_of_strangers_have_one_label() -> None:
    metrics = Metrics()
    for method, route, status in (("GET", "/v1/models", 200), ("GET", None, 404), ("BREW", "/v1/models", 405)):
        metrics.count_answer(method, route, status)
    metrics.count_answer("POST", "/v1/completions", None)
    NoMetrics().count_answer("GET", "/v1/models", 200)
    samples = [line for line in metrics.render().decode().splitlines() if line.startswith("manylora_http_requests")]
    assert samples == [
        'manylora_http_requests_total{method="GET",route="/v1/models",status="200"} 1.0',
        'manylora_http_requests_total{method="__other__",route="__other__",status="404"} 1.0',
        'manylora_http_requests_total{method="__other__",route="__other__",status="405"} 1.0',
        'manylora_http_requests_total{method="POST",route="/v1/completions",status="none"} 1.0',
    ]
