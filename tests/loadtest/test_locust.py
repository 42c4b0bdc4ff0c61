"""The Locust file, run by Locust itself, in another process: importing locust patches the standard library."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loadtest.conftest import Serve
from tests.loadtest.fake_server import FakeServer

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="locust is an optional extra")
def test_locust_sends_the_scenarios_requests(serve: Serve) -> None:
    fake = FakeServer()
    command = [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "--host", serve(fake), "--headless"]
    finished = subprocess.run(
        [*command, "--users", "2", "--spawn-rate", "2", "--run-time", "4s", "--exit-code-on-error", "1"],
        cwd=ROOT, env={**os.environ, "LOADTEST_SCENARIO": "smoke", "PYTHONPATH": str(ROOT)}, timeout=120,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert fake.num_ok > 0
    assert set(fake.models) <= {"tiny", *fake.adapters}
