"""Servers in processes of their own, forked from one that has imported what a server imports: no two seconds, not six.

Otherwise each is like one with an interpreter of its own: its process id, signals, environment, exit status, standard
error and files are its own. That a new interpreter brings a server up is shown where `python -m manylora serve` is run.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.server_imports"])


class ServerProcess:
    """A server with these settings, which starts; its standard output and error go to the file `log`."""

    def __init__(self, settings: Mapping[str, Any], log: Path) -> None:
        self._announced, announced = _CONTEXT.Pipe(duplex=False)
        self._process = _CONTEXT.Process(
            target=_serve, args=(dict(settings), log, dict(os.environ), announced), daemon=True
        )
        self._process.start()
        announced.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def announcement(self) -> dict[str, Any] | None:
        """What it announces once it answers; None if it has ended instead."""
        try:
            announcement: dict[str, Any] = self._announced.recv()
        except EOFError:
            return None
        return announcement

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, once it has ended. Raises TimeoutError after `timeout` seconds."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"Process {self.pid} still runs after {timeout} s.")
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it ended by itself, and nobody has told yet
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """End it, if it runs, and wait for that."""
        self.kill()
        self.wait()
        self._announced.close()


def _serve(settings: dict[str, Any], log: Path, environment: dict[str, str], announced: Connection) -> None:
    from tests.e2e.serve_once import run  # not before it is needed: tests that start no server import none

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    send: Callable[[Any], None] = announced.send
    sys.exit(run(settings, lambda announcement: send(asdict(announcement))))
