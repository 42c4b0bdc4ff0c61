"""What a soak needs: requests that are refused or left, adapters that come and go, a server that is watched."""

import os
from collections import Counter
from pathlib import Path

import pytest

from manylora_loadtest.record import read_run, write_run
from manylora_loadtest.runner import Run
from manylora_loadtest.server_watch import ServerSample, server_figures
from manylora_loadtest.summary import summarise
from tests.loadtest.conftest import Serve, run, scenario
from tests.loadtest.fake_server import FakeServer

WATCHED = {"memory_growth_mb": 1000, "open_files_growth": 1000, "threads_growth": 1000, "kv_blocks_left": 0}


def test_requests_that_must_be_refused_are_and_count_as_no_failure(serve: Serve) -> None:
    fake = FakeServer(is_strict=True)
    requests = {"prompt_tokens": 5, "output_tokens": 4, "refused_share": 0.5}
    loaded = scenario(requests=requests, arrival={"process": "poisson", "rate": 200, "requests": 60})
    summary = summarise(run(loaded, serve(fake)))
    outcomes = summary.totals.outcomes
    assert outcomes == {"ok": fake.num_ok, "refused": fake.num_refused}
    assert min(outcomes.values()) > 15
    assert (summary.overall.requests, summary.overall.error_rate) == (fake.num_ok, 0)


def test_a_server_that_takes_what_is_wrong_is_found_out(serve: Serve) -> None:
    loaded = scenario(requests={"prompt_tokens": 5, "output_tokens": 4, "refused_share": 1.0})
    finished = run(loaded, serve(FakeServer(is_strict=False, fail_every=2)))
    outcomes = Counter(result.outcome for result in finished.results)
    assert outcomes["not_refused"]
    assert set(outcomes) <= {"not_refused", "connection"}  # a busy machine may lose one to the server that stops
    assert summarise(finished).overall.error_rate == 1


def test_clients_that_leave_are_told_from_answers_that_fail(serve: Serve) -> None:
    fake = FakeServer(token_s=0.02)
    requests = {"prompt_tokens": 5, "output_tokens": 50, "left_share": 0.5, "left_after_s": 0.05}
    summary = summarise(run(scenario(requests=requests), serve(fake)))
    outcomes = summary.totals.outcomes
    assert set(outcomes) == {"ok", "left"}
    assert outcomes["left"] >= 5
    assert summary.overall.error_rate == 0


def test_shares_of_such_requests_leave_the_others_as_they_were(serve: Serve) -> None:
    fakes = [FakeServer(is_strict=True), FakeServer(is_strict=True)]
    for fake, share in zip(fakes, (0.0, 0.4), strict=True):
        loaded = scenario(requests={"prompt_tokens": 5, "output_tokens": 4, "refused_share": share})
        run(loaded, serve(fake))
    plain, mixed = ([body["prompt"] for body in fake.bodies] for fake in fakes)
    assert set(mixed) < set(plain)


def write_adapter(folder: Path, tensors: bytes) -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(tensors)
    return str(folder)


def cycle_against(serve: Serve, fake: FakeServer, tmp_path: Path) -> Run:
    folders = [write_adapter(tmp_path / name, name.encode()) for name in ("one", "two")]
    change = {"kind": "cycle", "adapter": "fresh", "every_s": 0.02, "times": 14, "folders": folders}
    return run(scenario(changes=[change], arrival={"process": "constant", "rate": 20, "duration_s": 2}), serve(fake))


def test_a_cycle_is_a_whole_life_of_an_adapter(serve: Serve, tmp_path: Path) -> None:
    fake = FakeServer(is_strict=True, sound=(b"{}one", b"{}two"), has_plain_answers=True)
    finished = cycle_against(serve, fake, tmp_path)
    life = ["upload", "upload", "use", "promote", "use", "damaged upload", "delete"]
    assert [change.kind for change in finished.changes] == life * 2
    assert [change.error for change in finished.changes if not change.is_ok] == []
    assert fake.deleted == [[b"{}one", b"{}two"]] * 2
    assert fake.active["fresh"] == [1, 1]


def test_a_damaged_upload_that_is_taken_is_a_failure(serve: Serve, tmp_path: Path) -> None:
    fake = FakeServer(is_strict=True, sound=(b"{}one", b"{}two", b"{}on"), has_plain_answers=True)
    finished = cycle_against(serve, fake, tmp_path)
    assert [change.kind for change in finished.changes if not change.is_ok] == ["damaged upload"] * 2


def samples(memory: list[int], *, last_blocks: int = 0) -> list[ServerSample]:
    """One a second, and the last one after the load."""
    return [
        *(ServerSample(float(s), m, open_files=40, threads=9, kv_blocks=8, slots=4) for s, m in enumerate(memory)),
        ServerSample(len(memory) + 1.0, kv_blocks=last_blocks, slots=0),
    ]


def test_growth_is_that_of_the_last_quarter_over_the_second() -> None:
    filling_up = [*range(0, 100_000_000, 1_000_000), *[100_000_000] * 300]
    leaking = [s * 1_000_000 for s in range(400)]
    for memory, expected in ((filling_up, 0.0), (leaking, 200.0)):
        figures = server_figures(samples(memory), 0.0, 400.0)
        assert figures is not None
        assert figures.memory_growth_mb == pytest.approx(expected, abs=1)
        assert figures.open_files_growth == figures.threads_growth == figures.kv_blocks_growth == 0


def test_single_peaks_are_no_growth() -> None:
    memory = [10_000_000] * 400
    for second in (310, 350, 399):
        memory[second] = 10**9
    figures = server_figures(samples(memory), 0.0, 400.0)
    assert figures is not None
    assert figures.memory_growth_mb == 0


def test_what_cannot_be_seen_is_not_measured() -> None:
    assert server_figures([], 0.0, 1.0) is None
    figures = server_figures([ServerSample(0.5)], 0.0, 1.0)
    assert figures is not None
    assert figures.memory_growth_mb is None


@pytest.mark.parametrize("left", [0, 3])
def test_a_watched_run_has_figures_of_the_server_and_keeps_them(
    serve: Serve, tmp_path: Path, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manylora_loadtest.server_watch._EVERY_S", 0.02)
    monkeypatch.setattr("manylora_loadtest.server_watch._SETTLED_WITHIN_S", 0.3)
    arrival = {"process": "constant", "rate": 20, "duration_s": 1}
    loaded = scenario(arrival=arrival, thresholds=WATCHED)
    finished = run(loaded, serve(FakeServer(left_in_use=left)), pid=os.getpid())
    summary = summarise(finished)
    assert summary.server is not None
    assert (summary.server.kv_blocks_left, summary.server.slots_left) == (left, left)
    assert all(sample.memory_bytes and sample.open_files and sample.threads for sample in finished.server)
    assert summary.is_passed == (left == 0)
    write_run(tmp_path / "run.jsonl", finished, summary)
    assert summarise(read_run(tmp_path / "run.jsonl")).server == summary.server


def test_a_server_that_is_not_watched_fails_such_thresholds(serve: Serve) -> None:
    summary = summarise(run(scenario(thresholds=WATCHED), serve(FakeServer())))
    assert summary.server is None
    assert not any(threshold.is_passed for threshold in summary.thresholds)
