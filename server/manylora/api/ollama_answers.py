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
from manylora.api.token_details import logprob_json
from manylora.engine.interface import Delta, FinishReason, TokenLogprob
from manylora.errors import ManyloraError

__all__ = ["ChatShape", "GenerateShape", "OllamaAnswer"]

_NS_PER_MS: Final = 1_000_000
_NS_PER_S: Final = 1_000_000_000
_LOGPROBS_AT_ONCE: Final = 64


@dataclass(frozen=True, slots=True)
class ChatShape:
    """Of `/api/chat`: where the text stands. `model` is the name that the client wrote."""

    model: str

    def text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}


class GenerateShape(ChatShape):
    """Of `/api/generate`."""

    def text(self, text: str) -> dict[str, Any]:
        return {"response": text}


class OllamaAnswer:
    """Implements `run.Renderer`. There is one choice."""

    def __init__(self, run: Run, shape: ChatShape) -> None:
        self._run = run
        self._shape = shape
        self._codec = run.services.engine.codec
        self._has_logprobs = run.prompts[0].params.logprobs is not None
        self._texts: list[str] = []
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
        self._texts.append(delta.text)
        self._take(delta)

    def whole(self) -> bytes:
        return self._line("".join(self._texts), is_done=True)

    def events(self, choice: int, delta: Delta) -> Sequence[bytes]:
        self._take(delta)
        return (self._line(delta.text),) if delta.text or self._logprobs else ()

    def last_events(self) -> Sequence[bytes]:
        return (self._line("", is_done=True),)

    def failed(self, error: ManyloraError) -> Sequence[bytes]:
        return (orjson.dumps(ollama_error(error)),)

    # parts

    def _take(self, delta: Delta) -> None:
        if delta.finish_reason is not None:
            self._done_reason = "length" if delta.finish_reason is FinishReason.LENGTH else "stop"

    def _line(self, text: str, *, is_done: bool = False) -> bytes:
        line: dict[str, Any] = {
            "model": self._shape.model,
            "created_at": datetime.now(UTC).isoformat(),
            **self._shape.text(text),
            "done": is_done,
        }
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
