"""Work on what strangers wrote, in processes that can be spared.

A `Helper` is this process's end of one that is started when it is first needed, and again where it has ended. The other
end does each piece of work in a child of its own (`in_child`), with bounds on its CPU time and its memory: whatever the
piece does, that child is all that is lost. Requests and answers are JSON, each after its length in four bytes.
"""

import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, BinaryIO, cast

import psutil

from manylora.errors import Unavailable

__all__ = ["Bounds", "Helper", "in_child", "read_frame", "serve", "write_frame"]


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a child may take: seconds of a CPU, bytes of memory and of stack, seconds until it has answered."""

    cpu_s: float
    memory_bytes: int
    stack_bytes: int
    wait_s: int


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next message, or None at the end."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    (length,) = struct.unpack(">I", head)
    body = stream.read(length)
    return body if len(body) == length else None


def write_frame(stream: BinaryIO, body: bytes) -> None:
    stream.write(struct.pack(">I", len(body)) + body)
    stream.flush()


# in a helper


def serve(work: Callable[[dict[str, Any]], dict[str, Any]], bounds: Bounds) -> None:
    """Do `work` on each request that comes by standard input, in a child each, until there is no more."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while (request := read_frame(requests)) is not None:
        asked: dict[str, Any] = json.loads(request)
        write_frame(answers, json.dumps(in_child(partial(work, asked), bounds)).encode())


def in_child(work: Callable[[], dict[str, Any]], bounds: Bounds) -> dict[str, Any]:
    """What `work` gives in a child of this process; `{"ended": "time"}` or `"memory"` where that does not end well."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # where a library's last words would go
        with os.fdopen(writing, "wb") as file:
            file.write(json.dumps(_bounded(work, bounds)).encode())
        os._exit(0)
    os.close(writing)
    answer = _read_all(reading, bounds)
    if answer is None:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if answer and not status:
        found: dict[str, Any] = json.loads(answer)
        return found
    is_late = answer is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF)
    return {"ended": "time" if is_late else "memory"}


def _bounded(work: Callable[[], dict[str, Any]], bounds: Bounds) -> dict[str, Any]:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_STACK, (bounds.stack_bytes, resource.getrlimit(resource.RLIMIT_STACK)[1]))
    most = psutil.Process().memory_info().vms + bounds.memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, bounds.cpu_s)
    try:
        return work()
    except MemoryError:
        return {"ended": "memory"}


def _read_all(pipe: int, bounds: Bounds) -> bytes | None:
    """What comes until the pipe is closed; None where that takes too long, time in which all is stopped not counted."""
    parts: list[bytes] = []
    seconds = 0
    with os.fdopen(pipe, "rb", buffering=0) as file:
        while seconds < bounds.wait_s:
            if not select.select([file], [], [], 1.0)[0]:
                seconds += 1
                continue
            part = file.read(2**16)
            if not part:
                return b"".join(parts)
            parts.append(part)
    return None


# beside it


class Helper:
    """The server's end of a process that runs `module`. `greeting` is what that is told before the first request.

    One thread at a time asks; any may close it.
    """

    def __init__(self, module: str, greeting: Callable[[], bytes] | None = None) -> None:
        self._module = module
        self._greeting = greeting
        self._process: subprocess.Popen[bytes] | None = None
        self._ending: Callable[[], object] | None = None
        self._is_closed = False

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer. Raises Unavailable."""
        body = json.dumps(request).encode()
        for _ in range(2):
            if self._is_closed:
                break
            try:
                process = self._started()
                write_frame(_pipe(process.stdin), body)
                answer = read_frame(_pipe(process.stdout))
            except OSError:
                answer = None
            if answer is not None:
                found: dict[str, Any] = json.loads(answer)
                return found
            self.end()
        raise Unavailable(f"The process {self._module} does not run, so this cannot be tried now. See the log.")

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            # It is as nice as the thread that starts it.
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # a key pressed in the server's terminal is not meant for it
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
            # Whoever drops a helper without a word leaves no process behind.
            self._ending = weakref.finalize(self, _end, self._process)
            if self._greeting is not None:
                write_frame(_pipe(self._process.stdin), self._greeting())
        return self._process

    def close(self) -> None:
        """Ends what it is at, for good; whoever asks calls `end` afterwards."""
        self._is_closed = True
        process = self._process
        if process is not None:
            process.kill()

    def end(self) -> None:
        self._process, ending, self._ending = None, self._ending, None
        if ending is not None:
            ending()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # of what was written and not read
                pipe.close()


def _pipe(stream: IO[bytes] | None) -> BinaryIO:
    assert stream is not None
    return cast("BinaryIO", stream)
