"""What the README's `make serve` starts, on a free port, for the pages whose commands are typed in."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATIENCE_S = 300


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, default_model_dir: Path) -> Iterator[str]:
    """The address of a real server on the default model and the shipped adapters."""
    folder = tmp_path_factory.mktemp("served")
    said = folder / "said"
    command = [sys.executable, "-m", "manylora", "serve", "--adapters", "adapters", "--port", "0"]
    with (
        said.open("w") as out,
        subprocess.Popen(
            [*command, "--data-dir", str(folder / "data"), "--kv-cache-memory", "512MiB"],
            stdout=out,
            stderr=out,
            cwd=ROOT,
        ) as process,
    ):
        try:
            yield _address(process, said)
        finally:
            process.send_signal(signal.SIGTERM)


def _address(process: "subprocess.Popen[bytes]", said: Path) -> str:
    until = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < until:
        if found := re.search(r"Dashboard +(http://\S+)/dashboard", said.read_text()):
            return found[1]
        time.sleep(0.2)
    pytest.fail(f"no server: {said.read_text()}")
