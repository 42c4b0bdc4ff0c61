"""The Locust file, run by Locust itself, in another process: importing locust patches the standard library."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.loadtest.conftest import Serve
from tests.loadtest.fake_server import FakeServer

ROOT = Path(__file__).parents[2]
NUM_ANSWERS = 50  # among which every tenant and model has its turn


pytestmark = pytest.mark.slow


def run_locust(fake: FakeServer, url: str, scenario: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Locust's end, once the server has answered some of its requests; locust ends by itself after two minutes."""
    command = [sys.executable, "-m", "locust", "-f", "loadtest/manylora_loadtest/locustfile.py", "--host", url]
    command += ["--headless", "--users", "2", "--spawn-rate", "2", "--run-time", "110s", "--exit-code-on-error", "1"]
    set_up = {"LOADTEST_SCENARIO": scenario, "PYTHONPATH": str(ROOT / "loadtest")}
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment, **set_up}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
        while process.poll() is None and fake.num_ok < NUM_ANSWERS:
            time.sleep(0.05)
        process.terminate()
        out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def test_locust_sends_the_scenarios_requests(serve: Serve) -> None:
    fake = FakeServer()
    finished = run_locust(fake, serve(fake), "smoke")
    assert finished.returncode == 0, finished.stderr
    assert fake.num_ok > 0
    assert set(fake.models) <= {"tiny", *fake.adapters}


TENANTS = """
name = "tenants"

[arrival]
process = "closed"
concurrency = 1
requests = 1

[adapters]
discover = true

[requests]
prompt_tokens = 4
output_tokens = 2

[[tenants]]
name = "acme"
key_env = "KEY_ACME"

[[tenants]]
name = "globex"
key_env = "KEY_GLOBEX"
adapters = { names = ["a003"] }
"""


def test_locust_sends_for_every_tenant_with_its_own_key(serve: Serve, tmp_path: Path) -> None:
    fake = FakeServer(keys={"sk-acme": "acme", "sk-globex": "globex"})
    (tmp_path / "tenants.toml").write_text(TENANTS)

    finished = run_locust(fake, serve(fake), str(tmp_path / "tenants.toml"), KEY_ACME="sk-acme", KEY_GLOBEX="sk-globex")

    assert finished.returncode == 0, finished.stderr
    assert set(fake.tenants) == {"acme", "globex"}
