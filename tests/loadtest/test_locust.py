"""The Locust file, run by Locust itself, in another process: importing locust patches the standard library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loadtest.conftest import Serve
from tests.loadtest.fake_server import FakeServer

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def run_locust(url: str, scenario: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "locust",
        "-f",
        "loadtest/manylora_loadtest/locustfile.py",
        "--host",
        url,
        "--headless",
    ]
    return subprocess.run(
        [*command, "--users", "2", "--spawn-rate", "2", "--run-time", "4s", "--exit-code-on-error", "1"],
        cwd=ROOT, timeout=120,
        env={**os.environ, **environment, "LOADTEST_SCENARIO": scenario, "PYTHONPATH": str(ROOT / "loadtest")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_locust_sends_the_scenarios_requests(serve: Serve) -> None:
    fake = FakeServer()
    finished = run_locust(serve(fake), "smoke")
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

    finished = run_locust(serve(fake), str(tmp_path / "tenants.toml"), KEY_ACME="sk-acme", KEY_GLOBEX="sk-globex")

    assert finished.returncode == 0, finished.stderr
    assert set(fake.tenants) == {"acme", "globex"}
