"""A process in which grammars of strangers are tried: one child for each, with a bound on its time and its memory.

A grammar can make the library that follows it run for minutes, or end the process that it runs in. Here that is a
child, which shares the vocabulary's memory with its parent and which nobody misses. Requests and answers are JSON, each
after its length in four bytes; the vocabulary comes first. The process ends with its standard input.
"""

import json
import os
import resource
import select
import signal
import struct
import sys
from typing import Any, BinaryIO, Final

import llguidance
import psutil

from manylora.grammars.grammar import GrammarKind
from manylora.grammars.language import in_library_notation, try_out
from manylora.grammars.vocabulary import Vocabulary

__all__ = ["MAX_COMPILE_BYTES", "MAX_COMPILE_S", "main", "read_frame", "write_frame"]

MAX_COMPILE_S: Final = 0.5  # of a CPU
MAX_COMPILE_BYTES: Final = 268_435_456
MAX_WAIT_S: Final = 60  # while other processes have the CPUs
_STACK_BYTES: Final = 2**20  # far less than the threads have that do the same again


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


def _bound_myself() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_STACK, (_STACK_BYTES, resource.getrlimit(resource.RLIMIT_STACK)[1]))
    most = psutil.Process().memory_info().vms + MAX_COMPILE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, MAX_COMPILE_S)


def _tried(tokenizer: llguidance.LLTokenizer, kind: GrammarKind, source: str) -> dict[str, Any]:
    """In the child: what became of the grammar, and the memory that it took."""
    _bound_myself()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        text = in_library_notation(kind, source, tokenizer)
        fault = try_out(tokenizer, text)
    except MemoryError:
        return {"ended": "memory"}
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the grammar's fault
        return {"fault": str(error) or type(error).__name__}
    if fault:
        return {"fault": fault}
    return {"text": text, "num_bytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024}


def _bytes_of_nothing(tokenizer: llguidance.LLTokenizer) -> int:
    """What the trial of the smallest grammar takes: pages that a child touches whatever it does."""
    found: dict[str, Any] = json.loads(_in_child(tokenizer, "choice", '["a"]'))
    return int(found.get("num_bytes", 0))


def _in_child(tokenizer: llguidance.LLTokenizer, kind: GrammarKind, source: str) -> bytes:
    """Try a grammar in a process of its own, and say so if that does not end well."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # where the library's last words would go
        with os.fdopen(writing, "wb") as file:
            file.write(json.dumps(_tried(tokenizer, kind, source)).encode())
        os._exit(0)
    os.close(writing)
    answer = _read_all(reading)
    if answer is None:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if answer and not status:
        return answer
    is_late = answer is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF)
    return json.dumps({"ended": "time" if is_late else "memory"}).encode()


def _read_all(pipe: int) -> bytes | None:
    """What comes until the pipe is closed; None where that takes too long, time in which all is stopped not counted."""
    parts: list[bytes] = []
    seconds = 0
    with os.fdopen(pipe, "rb", buffering=0) as file:
        while seconds < MAX_WAIT_S:
            if not select.select([file], [], [], 1.0)[0]:
                seconds += 1
                continue
            part = file.read(2**16)
            if not part:
                return b"".join(parts)
            parts.append(part)
    return None


def main() -> None:
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    vocabulary = read_frame(requests)
    if vocabulary is None:
        return
    tokenizer = Vocabulary.from_json(vocabulary).build()
    nothing = _bytes_of_nothing(tokenizer)
    while (request := read_frame(requests)) is not None:
        asked = json.loads(request)
        found: dict[str, Any] = json.loads(_in_child(tokenizer, asked["kind"], asked["source"]))
        if "num_bytes" in found:
            found["num_bytes"] = max(0, found["num_bytes"] - nothing)
        write_frame(answers, json.dumps(found).encode())


if __name__ == "__main__":
    main()
