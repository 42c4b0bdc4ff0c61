"""Whole runs against a real server that counts."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from manylora_loadtest.errors import ServerUnavailable
from manylora_loadtest.summary import latencies, summarise
from tests.loadtest.conftest import Serve, run, scenario
from tests.loadtest.fake_server import FakeServer

CLOSED = {"process": "closed", "concurrency": 4, "requests": 20}


def test_totals_equal_what_the_server_counted(serve: Serve) -> None:
    fake = FakeServer(fail_every=7)
    lengths = {"kind": "uniform", "low": 1, "high": 9}
    loaded = scenario(requests={"prompt_tokens": lengths, "output_tokens": lengths}, warmup_requests=3)
    totals = summarise(run(loaded, serve(fake))).totals
    assert (totals.requests, totals.ok) == (fake.num_requests, fake.num_ok) == (23, 20)
    assert (totals.prompt_tokens, totals.output_tokens) == (fake.prompt_tokens, fake.completion_tokens)
    assert totals.outcomes == {"ok": 20, "http_503": 3}


def test_counters_of_the_server_are_compared(serve: Serve) -> None:
    url = serve(FakeServer())
    summaries = [summarise(run(scenario(), url)) for _ in range(2)]
    assert [summary.counter_mismatches for summary in summaries] == [0, 0]


def test_server_that_forgets_tokens_is_found_out(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manylora_loadtest.runner._COUNTERS_WITHIN_S", 0.2)
    summary = summarise(run(scenario(), serve(FakeServer(undercount=1))))
    assert (summary.counter_mismatches, summary.usage_mismatches) == (1, 0)


def test_the_usage_export_is_compared_too(serve: Serve) -> None:
    url = serve(FakeServer())
    assert [summarise(run(scenario(), url)).usage_mismatches for _ in range(2)] == [0, 0]


def test_server_that_charges_too_much_is_found_out(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manylora_loadtest.runner._COUNTERS_WITHIN_S", 0.2)
    summary = summarise(run(scenario(), serve(FakeServer(overcharge=1))))
    assert (summary.counter_mismatches, summary.usage_mismatches) == (0, 1)


def test_without_a_usage_export_there_is_nothing_to_compare(serve: Serve) -> None:
    assert summarise(run(scenario(), serve(FakeServer(has_usage=False)))).usage_mismatches is None


def test_adapters_are_named_by_popularity(serve: Serve) -> None:
    fake = FakeServer()
    adapters = {"discover": True, "popularity": {"kind": "round_robin"}}
    run(scenario(adapters=adapters, arrival=CLOSED), serve(fake))
    assert fake.models == dict.fromkeys(fake.adapters, 5)


def test_base_share_goes_to_the_base(serve: Serve) -> None:
    fake = FakeServer()
    run(scenario(adapters={"names": ["a000"], "base_share": 1.0}), serve(fake))
    assert fake.models == {"tiny": 20}


def test_same_seed_sends_the_same_requests(serve: Serve) -> None:
    fakes = [FakeServer(), FakeServer()]
    for fake in fakes:
        run(
            scenario(chat={"share": 0.5}, adapters={"discover": True}, arrival={**CLOSED, "concurrency": 1}),
            serve(fake),
        )
    assert fakes[0].bodies == fakes[1].bodies


def test_chats_share_their_prefixes(serve: Serve) -> None:
    fake = FakeServer()
    loaded = scenario(chat={"share": 1.0, "prefix_tokens": 12, "num_prefixes": 2})
    finished = run(loaded, serve(fake))
    assert len(fake.system_messages) == 2
    assert {len(message.split()) for message in fake.system_messages} == {12}
    assert {result.prompt_tokens for result in finished.results} == {17}


def test_tenants_send_by_weight_with_their_own_keys(serve: Serve) -> None:
    fake = FakeServer(keys={"key-a": "acme", "key-b": "bolt"})
    tenants = [{"name": "acme", "weight": 3, "key": "key-a"}, {"name": "bolt", "key": "key-b"}]
    arrival = {"process": "closed", "concurrency": 8, "requests": 400}
    run(scenario(tenants=tenants, arrival=arrival, requests={"prompt_tokens": 1, "output_tokens": 1}), serve(fake))
    assert fake.tenants["acme"] / 400 == pytest.approx(0.75, abs=0.06)
    assert sum(fake.tenants.values()) == 400


def test_wrong_key_is_a_failure_of_each_request(serve: Serve) -> None:
    finished = run(scenario(), serve(FakeServer(keys={"right": "acme"})), key="wrong")
    assert Counter(result.outcome for result in finished.results) == {"http_401": 20}
    assert {result.error for result in finished.results} == {"wrong key"}


def test_error_inside_a_stream_is_a_failure(serve: Serve) -> None:
    finished = run(scenario(), serve(FakeServer(break_every=5)))
    broken = [result for result in finished.results if not result.is_ok]
    assert [(r.outcome, r.error, r.status) for r in broken] == [("stream_error", "engine stopped", 200)] * 4


def test_stream_without_its_end_is_a_failure(serve: Serve) -> None:
    finished = run(scenario(), serve(FakeServer(cut_every=4)))
    assert Counter(result.outcome for result in finished.results) == {"ok": 15, "cut_off": 5}


def test_answer_that_takes_too_long_is_a_timeout(serve: Serve) -> None:
    loaded = scenario(
        arrival={**CLOSED, "requests": 2},
        requests={"prompt_tokens": 1, "output_tokens": 2, "timeout_s": 0.2},
    )
    finished = run(loaded, serve(FakeServer(first_token_s=5)))
    assert [result.outcome for result in finished.results] == ["timeout"] * 2


def test_latency_counts_from_the_scheduled_arrival(serve: Serve) -> None:
    """A server that answers one request at a time: with few in flight, what waits in the client counts as well."""
    arrival = {"process": "constant", "rate": 100, "requests": 8}
    served_s = 0.05
    for limit in ({}, {"max_in_flight": 1}):
        fake = FakeServer(first_token_s=served_s, one_at_a_time=True)
        finished = run(scenario(arrival={**arrival, **limit}), serve(fake))
        ttft_s = sorted(latencies(finished.results, "ttft"))
        gap_s = 1 / 100
        due_last_s, done_last_s = 7 * gap_s, 8 * served_s
        assert ttft_s[-1] >= done_last_s - due_last_s
        assert all(result.due_s <= result.sent_s for result in finished.results)


def test_open_loop_sends_whatever_the_answers_do(serve: Serve) -> None:
    """No answer starts before the last request has come, so a client that waited for one would never end."""
    loaded = scenario(requests={"prompt_tokens": 1, "output_tokens": 1, "timeout_s": 60})
    finished = run(loaded, serve(FakeServer(hold_until=20)))
    assert Counter(result.outcome for result in finished.results) == {"ok": 20}


def test_closed_loop_never_has_more_in_flight_than_clients(serve: Serve) -> None:
    finished = run(scenario(arrival={**CLOSED, "concurrency": 3}), serve(FakeServer(token_s=0.002)))
    moments = [(r.sent_s, 1) for r in finished.results] + [(r.end_s, -1) for r in finished.results]
    in_flight, most = 0, 0
    for _, step in sorted(moments):
        in_flight += step
        most = max(most, in_flight)
    assert most == 3


def test_sweep_has_a_stage_for_each_rate(serve: Serve) -> None:
    loaded = scenario(arrival={"process": "poisson", "rate": [50, 100], "requests": 10}, slo={"e2e_ms": 60_000})
    summary = summarise(run(loaded, serve(FakeServer())))
    assert [(stage.rate, figures.requests) for stage, figures in summary.stages] == [(50, 10), (100, 10)]
    assert summary.rate_within_slo == 100


def test_tokens_and_tiers_are_read_from_the_stream(serve: Serve) -> None:
    finished = run(scenario(arrival={**CLOSED, "requests": 1}), serve(FakeServer(token_s=0.01)))
    (result,) = finished.results
    assert (result.output_tokens, result.num_events, result.load_tier, result.queue_s) == (4, 4, "host", 0.002)
    assert result.tpot_s is not None
    assert 0 < result.tpot_s <= result.e2e_s / 3


def test_role_event_of_a_chat_is_not_its_first_token(serve: Serve) -> None:
    loaded = scenario(chat={"share": 1.0}, arrival={**CLOSED, "requests": 1})
    (result,) = run(loaded, serve(FakeServer())).results
    assert (result.num_events, result.output_tokens) == (4, 4)


def test_uploads_and_promotions_happen_during_the_run(serve: Serve, tmp_path: Path) -> None:
    folders = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(name.encode())
        folders.append(str(folder))
    changes = [
        {"kind": "upload", "adapter": "fresh", "every_s": 0.05, "times": 3, "folders": folders},
        {"kind": "promote", "adapter": "old", "start_s": 0.1, "every_s": 0.05, "times": 4},
    ]
    fake = FakeServer(versions={"old": [b"", b"", b""]})
    finished = run(scenario(changes=changes, arrival={"process": "constant", "rate": 20, "duration_s": 2}), serve(fake))
    assert fake.versions["fresh"] == [b"{}one", b"{}two", b"{}one"]
    assert fake.active["old"] == [1, 2, 3, 1]
    assert [change.is_ok for change in finished.changes] == [True] * 7
    assert summarise(finished).num_failed_changes == 0


def test_refused_change_is_counted(serve: Serve) -> None:
    changes = [{"kind": "promote", "adapter": "nobody", "every_s": 1, "times": 1}]
    finished = run(
        scenario(changes=changes, arrival={"process": "constant", "rate": 40, "duration_s": 0.3}), serve(FakeServer())
    )
    assert [dataclasses.astuple(change)[0] for change in finished.changes] == ["promote"]
    assert summarise(finished).num_failed_changes == 1


def test_no_server_is_said_plainly() -> None:
    with pytest.raises(ServerUnavailable, match="does not answer"):
        run(scenario(), "http://127.0.0.1:9")


def test_slow_tenant_shows_in_the_fairness_figures(serve: Serve) -> None:
    fake = FakeServer(keys={"key-a": "acme", "key-b": "bolt"}, slow_tenants={"bolt": 2.0})
    tenants = [{"name": "acme", "key": "key-a"}, {"name": "bolt", "key": "key-b"}]
    fairness = summarise(run(scenario(tenants=tenants, slo={"ttft_ms": 1900}), serve(fake))).fairness
    assert fairness.shares["bolt"] == 0
    assert fairness.share_ratio == float("inf")
    assert fairness.jain_index == pytest.approx(0.5)
    assert fairness.tenant_ttft_ratio is not None
    assert fairness.tenant_ttft_ratio > 1
