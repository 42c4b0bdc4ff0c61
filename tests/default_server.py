"""What the README's `make serve` starts, on a free port: the default model and the shipped adapters."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]


@contextmanager
def default_server(folder: Path, patience_s: float, *flags: str) -> Iterator[str]:
    """Its address, once it is ready, its data below `folder`. Raises RuntimeError with its log if it does not start.

    `flags` are what stands in `ARGS` of `make serve`.
    """
    said = folder / "said"
    command = [sys.executable, "-m", "manylora", "serve", "--adapters", str(ROOT / "adapters"), "--port", "0"]
    command += ["--data-dir", str(folder / "data"), "--kv-cache-memory", "512MiB", *flags]
    with said.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT) as process:
        try:
            yield _address(process, said, patience_s)
        finally:
            process.send_signal(signal.SIGTERM)


def _address(process: "subprocess.Popen[bytes]", said: Path, patience_s: float) -> str:
    until = time.monotonic() + patience_s
    while process.poll() is None and time.monotonic() < until:
        if found := re.search(r"Dashboard +(http://\S+)/dashboard", said.read_text()):
            return found[1]
        time.sleep(0.2)
    raise RuntimeError(f"The server does not start:\n{said.read_text()}")
