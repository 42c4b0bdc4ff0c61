"""A process in which grammars of strangers are tried: one child for each, with a bound on its time and its memory.

A grammar can make the library that follows it run for minutes, or end the process that it runs in. Here that is a
child, which shares the vocabulary's memory with its parent and which nobody misses. The vocabulary comes first by
standard input, then the requests, each a grammar, or nothing, which asks what the vocabulary's tokens spell; the
process ends with them.
"""

import json
import resource
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import llguidance

from manylora.children import Bounds, in_child, read_frame, write_frame
from manylora.errors import InvalidRequest
from manylora.grammars.grammar import GrammarKind
from manylora.grammars.language import in_library_notation, try_out
from manylora.grammars.vocabulary import Spelling, Vocabulary

__all__ = ["MAX_COMPILE_BYTES", "MAX_COMPILE_S", "MAX_WAIT_S", "main"]

MAX_COMPILE_S: Final = 0.5  # of a CPU
MAX_COMPILE_BYTES: Final = 268_435_456
MAX_WAIT_S: Final = 60  # while other processes have the CPUs
_STACK_BYTES: Final = 2**20  # far less than the threads have that do the same again


_BOUNDS: Final = Bounds(MAX_COMPILE_S, MAX_COMPILE_BYTES, _STACK_BYTES, MAX_WAIT_S)


def _tried(tokenizer: llguidance.LLTokenizer, kind: GrammarKind, source: str) -> dict[str, Any]:
    """In the child: what became of the grammar, and the memory that it took."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        text = in_library_notation(kind, source, tokenizer)
        fault = try_out(tokenizer, text)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the grammar's fault
        return {"fault": str(error) or type(error).__name__}
    if fault:
        return {"fault": fault}
    return {"text": text, "num_bytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024}


def _bytes_of_nothing(tokenizer: llguidance.LLTokenizer) -> int:
    """What the trial of the smallest grammar takes: pages that a child touches whatever it does."""
    return int(_in_child(tokenizer, "choice", '["a"]').get("num_bytes", 0))


def _in_child(tokenizer: llguidance.LLTokenizer, kind: GrammarKind, source: str) -> dict[str, Any]:
    return in_child(partial(_tried, tokenizer, kind, source), _BOUNDS)


def main() -> None:
    vocabulary = read_frame(sys.stdin.buffer)
    if vocabulary is None:
        return
    try:
        tokenizer = Vocabulary.from_json(vocabulary).build()
    except InvalidRequest as error:
        refusal = {"refused": error.message}
        _answer(lambda asked: refusal)
        return
    nothing = _bytes_of_nothing(tokenizer)

    def found(asked: dict[str, Any]) -> dict[str, Any]:
        if "kind" not in asked:
            return Spelling.of(tokenizer).as_json()
        tried = _in_child(tokenizer, asked["kind"], asked["source"])
        if "num_bytes" in tried:
            tried["num_bytes"] = max(0, tried["num_bytes"] - nothing)
        return tried

    _answer(found)


def _answer(work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    while (request := read_frame(sys.stdin.buffer)) is not None:
        write_frame(sys.stdout.buffer, json.dumps(work(json.loads(request))).encode())


if __name__ == "__main__":
    main()
