"""Answers in Ollama's words: whole, and line by line. Durations are in nanoseconds."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import orjson

from manylora.api.answers import extension
from manylora.api.errors import ollama_error
from manylora.api.run import Deltas, Run
from manylora.api.said import Splitter, arguments_of
from manylora.api.token_details import logprob_json
from manylora.chat.pieces import Arguments, CallStart, Text
from manylora.engine.interface import Delta, FinishReason, TokenLogprob
from manylora.errors import ManyloraError

__all__ = ["ChatShape", "GenerateShape", "OllamaAnswer"]

_NS_PER_MS: Final = 1_000_000
_NS_PER_S: Final = 1_000_000_000
_LOGPROBS_AT_ONCE: Final = 64


@dataclass(frozen=True, slots=True)
class ChatShape:
    """Of `/api/chat`: where it stands what was said. `model` is the name that the client wrote."""

    model: str

    def said(self, text: str, thoughts: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, **_more(thoughts, calls)}}


class GenerateShape(ChatShape):
    """Of `/api/generate`."""

    def said(self, text: str, thoughts: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        return {"response": text, **_more(thoughts, calls)}


def _more(thoughts: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    return {**({"thinking": thoughts} if thoughts else {}), **({"tool_calls": calls} if calls else {})}


class OllamaAnswer:
    """Implements `run.Renderer`. There is one choice. A call is told of once it is complete."""

    def __init__(self, run: Run, shape: ChatShape, *, has_thoughts: bool) -> None:
        make = run.prompts[0].reader
        self._run = run
        self._shape = shape
        self._codec = run.codec
        self._has_logprobs = run.prompts[0].params.logprobs is not None
        self._splitter = Splitter(None if make is None else make(), has_reasoning=has_thoughts)
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._call: CallStart | None = None  # that is being written
        self._arguments: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._logprobs: list[bytes] = []  # JSON, since the last line
        self._done_reason = ""

    def arranged(self, deltas: Deltas) -> Deltas:
        return deltas

    async def keep(self, choice: int, logprobs: Sequence[TokenLogprob]) -> None:
        for start in range(0, len(logprobs), _LOGPROBS_AT_ONCE):
            began = time.perf_counter()
            part = logprobs[start : start + _LOGPROBS_AT_ONCE]
            self._logprobs += [logprob_json(entry, self._codec) for entry in part]
            if start + _LOGPROBS_AT_ONCE < len(logprobs):
                await asyncio.sleep(time.perf_counter() - began)

    def add(self, choice: int, delta: Delta) -> None:
        self._take(delta)

    def whole(self) -> bytes:
        return self._line(is_done=True)

    def events(self, choice: int, delta: Delta) -> Sequence[bytes]:
        self._take(delta)
        has_news = self._texts or self._thoughts or self._calls or self._logprobs
        return (self._line(),) if has_news else ()

    def last_events(self) -> Sequence[bytes]:
        return (self._line(is_done=True),)

    def failed(self, error: ManyloraError) -> Sequence[bytes]:
        return (orjson.dumps(ollama_error(error)),)

    # parts

    def _take(self, delta: Delta) -> None:
        for piece in self._splitter.split(delta):
            if isinstance(piece, Arguments):
                self._arguments.append(piece.text)
                continue
            self._end_call()
            if isinstance(piece, CallStart):
                self._call = piece
            else:
                (self._texts if isinstance(piece, Text) else self._thoughts).append(piece.text)
        if delta.finish_reason is not None:
            self._end_call()
            self._done_reason = "length" if delta.finish_reason is FinishReason.LENGTH else "stop"

    def _end_call(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            arguments, self._arguments = arguments_of("".join(self._arguments)), []
            function = {"index": call.index, "name": call.name, "arguments": arguments}
            self._calls.append({"id": call.id, "function": function})

    def _line(self, *, is_done: bool = False) -> bytes:
        """All that was said since the last one."""
        line: dict[str, Any] = {
            "model": self._shape.model,
            "created_at": datetime.now(UTC).isoformat(),
            **self._shape.said("".join(self._texts), "".join(self._thoughts), self._calls),
            "done": is_done,
        }
        self._texts, self._thoughts, self._calls = [], [], []
        if self._has_logprobs:
            line["logprobs"] = orjson.Fragment(b"[" + b",".join(self._logprobs) + b"]")
            self._logprobs = []
        if is_done:
            line |= {"done_reason": self._done_reason, **self._durations(), "manylora": extension(self._run)}
        return orjson.dumps(line)

    def _durations(self) -> dict[str, int]:
        counts = self._run.counts
        timing = counts.timing()
        assert timing is not None, "an answer ends after its first delta"
        begun = counts.arrived if counts.first_token is None else counts.first_token
        last = max(counts.last_token.values(), default=begun)
        prompt_ms = max(0.0, timing.ttft_ms - timing.queue_ms - timing.load_ms)
        return {
            "total_duration": int((time.perf_counter() - counts.arrived) * _NS_PER_S),
            "load_duration": int(timing.load_ms * _NS_PER_MS),
            "prompt_eval_count": counts.prompt_tokens,
            "prompt_eval_duration": int(prompt_ms * _NS_PER_MS),
            "eval_count": counts.completion_tokens,
            "eval_duration": int((last - begun) * _NS_PER_S),
        }
