"""Servers as child processes, from command lines with placeholders, each in a process group of its own."""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Server", "ServerDied", "end_on_sigterm", "fill_in", "free_port"]


class ServerDied(Exception):
    """A server ended or did not become ready; the message has the end of its log."""


def end_on_sigterm() -> None:
    """Let SIGTERM unwind the program like an exception, so that it stops its servers, which a pause makes deaf."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fill_in(command: str, values: dict[str, str]) -> list[str]:
    """The command's words with `{name}` replaced; a value may be several words. Raises ValueError for unknown names."""
    words: list[str] = []
    for word in shlex.split(command):
        try:
            words.extend(values[word[1:-1]].split() if word == "{lora_modules}" else [word.format(**values)])
        except (KeyError, IndexError) as error:
            known = ", ".join(f"{{{name}}}" for name in values)
            raise ValueError(f"{word!r} has an unknown placeholder; there are {known}") from error
    return words


@dataclass
class Server:
    """One server under test."""

    name: str
    command: list[str]
    url: str
    log: Path
    ready_path: str
    start_s: float | None = None  # from start to the first good answer of `ready_path`
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self, timeout_s: float) -> None:
        """Starts it and waits until `ready_path` answers 200. Raises ServerDied."""
        began = time.perf_counter()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        while not self.is_ready():
            if self._process.poll() is not None:
                raise ServerDied(f"{self.name} ended with code {self._process.returncode}:\n{self._log_end()}")
            if time.perf_counter() - began > timeout_s:
                self.stop()
                raise ServerDied(f"{self.name} was not ready after {timeout_s:.0f} s:\n{self._log_end()}")
            time.sleep(0.25)
        self.start_s = time.perf_counter() - began

    def pause(self) -> None:
        """Stops it from using any core (SIGSTOP) while another one is measured."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    @property
    def pid(self) -> int:
        """Of the process that runs."""
        assert self._process is not None
        return self._process.pid

    def end(self, number: signal.Signals, timeout_s: float = 60.0) -> int:
        """Sends the signal, waits for the process and returns its status; with force when the time is over."""
        assert self._process is not None
        process = self._process
        self._signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
        self.stop()
        return int(process.returncode)

    def stop(self) -> None:
        """Ends the whole process group, with force after ten seconds."""
        if self._process is None:
            return
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._process = None

    @contextlib.contextmanager
    def awake(self, is_pausing: bool) -> Iterator[None]:
        """Awake for the block, paused after it if `is_pausing`."""
        self.resume()
        try:
            yield
        finally:
            if is_pausing:
                self.pause()

    def is_ready(self) -> bool:
        """Whether `ready_path` answers 200 now."""
        try:
            with urllib.request.urlopen(self.url + self.ready_path, timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _log_end(self) -> str:
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-15:])
