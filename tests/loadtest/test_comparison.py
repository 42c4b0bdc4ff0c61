"""What `benchmarks/compare.py` counts and how it starts servers; the measuring itself is the load test's."""

import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare import measure, median, ratios
from benchmarks.servers import Server, ServerDied, fill_in, free_port
from benchmarks.workloads import Workload, comparison, standard
from tests.loadtest.conftest import Serve
from tests.loadtest.fake_server import FakeServer


def _record(server: str, repeat: int, rate: float, errors: int = 0) -> dict[str, Any]:
    return {
        "record": "measurement", "workload": "w", "server": server, "repeat": repeat,
        "output_tokens_per_s": rate, "errors": errors,
    }  # fmt: skip


def test_ratio_is_the_median_of_neighbouring_runs() -> None:
    records = [_record("a", k, rate) for k, rate in enumerate((10, 30, 90))]
    records += [_record("b", k, rate) for k, rate in enumerate((5, 10, 15))]
    (row,) = ratios(records, ["a", "b"])
    assert row["rates"] == {"a": 30, "b": 10}
    assert row["ratios"]["b"] == 3  # of 2, 3 and 6


def test_round_with_an_error_has_no_rate() -> None:
    (row,) = ratios([_record("a", 0, 10), _record("b", 0, 99, errors=1)], ["a", "b"])
    assert row["rates"]["b"] is None
    assert row["ratios"]["b"] is None


def test_median_of_an_even_number_is_between() -> None:
    assert (median([4, 1]), median([3, 1, 2]), median([])) == (2.5, 2, None)


def test_workloads_cover_the_grid_once() -> None:
    workloads = list(comparison())
    assert len({workload.name for workload in workloads}) == len(workloads) == 16
    assert standard() in workloads


def test_workload_sends_its_adapters_in_turn(serve: Serve) -> None:
    fake = FakeServer(adapters=())
    server = Server("fake", [], serve(fake), Path("unused"), "/v1/models")
    record = measure(server, Workload(adapters=4, concurrency=8, prompt="short"), scale=1.0, seed=0)
    assert fake.models == {f"a{n:03d}": 4 for n in range(4)}
    assert (record["requests"], record["errors"], record["output_tokens"]) == (16, 0, 16 * 64)


def test_placeholders_are_filled_in_and_unknown_ones_named() -> None:
    values = {"port": "81", "lora_modules": "a=/x b=/y"}
    assert fill_in("run 'a b' --port {port} {lora_modules}", values) == ["run", "a b", "--port", "81", "a=/x", "b=/y"]
    with pytest.raises(ValueError, match=r"\{prot\}"):
        fill_in("run {prot}", values)


def test_server_is_started_waited_for_and_ended(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(tmp_path)]
    server = Server("files", command, f"http://127.0.0.1:{port}", tmp_path / "log", "/")
    server.start(60)
    try:
        assert server.start_s is not None
        with server.awake(is_pausing=True):
            assert server.is_ready()
    finally:
        server.stop()
    assert not server.is_ready()


def test_server_that_ends_shows_its_log(tmp_path: Path) -> None:
    server = Server("broken", [sys.executable, "-c", "raise SystemExit('no model')"], "http://x", tmp_path / "log", "/")
    with pytest.raises(ServerDied, match="no model"):
        server.start(60)


_PAUSED = """
import sys, time
from pathlib import Path
from benchmarks.servers import Server, end_on_sigterm, free_port

end_on_sigterm()
port = free_port()
command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
server = Server("paused", command, f"http://127.0.0.1:{port}", Path(sys.argv[1]), "/")
try:
    server.start(60)
    server.pause()
    print(port, flush=True)
    time.sleep(600)
finally:
    server.stop()
"""


def test_terminated_comparison_leaves_no_paused_server(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _PAUSED, str(tmp_path / "log")]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as comparing:
        assert comparing.stdout is not None
        port = int(comparing.stdout.readline())
        socket.create_connection(("127.0.0.1", port)).close()  # the kernel still takes connections for it
        comparing.send_signal(signal.SIGTERM)
        assert comparing.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
