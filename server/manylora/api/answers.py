"""The bodies and stream events of the two inference routes."""

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import orjson

from manylora.api.logprobs import ChatLogprobs, CompletionLogprobs, LogprobsJson
from manylora.api.record import RequestRecord
from manylora.api.run import Job, Run
from manylora.api.schemas import StreamOptions
from manylora.engine.interface import AdapterRef, Delta, TextCodec, TokenLogprob

__all__ = ["Answer", "ChatAnswer", "CompletionAnswer"]

_DONE = b"data: [DONE]\n\n"
# A prompt's log-probabilities come all at once. So many are put into JSON at a time, a millisecond's work.
_LOGPROBS_AT_ONCE = 64


@dataclass(slots=True)
class _Choice:
    """One choice of an answer that is sent whole."""

    texts: list[str] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.finish_reason = delta.finish_reason


class Answer:
    """What both kinds share. `label` is the `model` that the answer names, `created` Unix seconds."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    logprobs_kind: ClassVar[type[LogprobsJson]]

    def __init__(self, job: Job, codec: TextCodec, *, label: str, created: int) -> None:
        self.job = job
        self.codec = codec
        has_logprobs = job.prompts[0].params.logprobs is not None
        self._logprobs = [self.logprobs_kind(codec) for _ in range(job.num_choices)] if has_logprobs else []
        self._head = {"id": f"{self.id_prefix}{job.id}", "created": created, "model": label}

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """One choice of a whole answer."""
        raise NotImplementedError

    def chunk_choice(self, index: int, delta: Delta) -> dict[str, Any]:
        """One choice of a stream event."""
        raise NotImplementedError

    def first_choices(self) -> list[dict[str, Any]]:
        """What a stream says before the first token."""
        return []

    def deltas(self, run: Run) -> AsyncGenerator[tuple[int, Delta], None]:
        return run.deltas()

    async def _keep_logprobs(self, index: int, delta: Delta) -> None:
        """Put them into JSON; of many, with pauses as long as the work, so that nobody else waits for all of it."""
        if not self._logprobs:
            return
        for start in range(0, len(delta.logprobs), _LOGPROBS_AT_ONCE):
            began = time.perf_counter()
            self._logprobs[index].add(delta.logprobs[start : start + _LOGPROBS_AT_ONCE])
            if start + _LOGPROBS_AT_ONCE < len(delta.logprobs):
                await asyncio.sleep(time.perf_counter() - began)

    def logprobs(self, index: int) -> orjson.Fragment | None:
        """Of the choice, those that came since the last time."""
        return self._logprobs[index].take() if self._logprobs else None

    async def whole(self, run: Run) -> bytes:
        """The JSON body, once every choice has finished."""
        choices = [_Choice() for _ in range(self.job.num_choices)]
        async for index, delta in self.deltas(run):
            choices[index].add(delta)
            await self._keep_logprobs(index, delta)
        rendered = [self.choice(i, "".join(c.texts), c.finish_reason) for i, c in enumerate(choices)]
        await run.complete()
        return orjson.dumps(
            {
                **self._head,
                "object": self.whole_object,
                "choices": rendered,
                "usage": usage(run.record),
                "manylora": extension(self.job.adapter, run.record),
            }
        )

    async def events(self, run: Run, options: StreamOptions) -> AsyncGenerator[bytes, None]:
        """The stream's events, ready to send, `[DONE]` included.

        With `include_usage` the last event has no choices but the usage, and all others have `usage: null`. With
        `continuous_usage_stats` each event has the usage so far. The last event, whichever it is, has the `manylora`
        block. `[DONE]` waits until the usage is stored.
        """
        is_running, has_last = options.continuous_usage_stats, options.include_usage
        head = b"data: " + orjson.dumps({**self._head, "object": self.chunk_object})[:-1] + b',"choices":'
        null = b',"usage":null}\n\n' if has_last else b"}\n\n"
        opening = self.first_choices()
        num_left = self.job.num_choices
        async for index, delta in self.deltas(run):
            num_left -= delta.finish_reason is not None
            if not delta.text and delta.finish_reason is None and not delta.logprobs and not opening:
                continue
            await self._keep_logprobs(index, delta)
            tail = b',"usage":' + orjson.dumps(usage(run.record)) + b"}\n\n" if is_running else null
            first = b"".join(head + orjson.dumps([choice]) + tail for choice in opening)
            opening = []
            payload = first + head + orjson.dumps([self.chunk_choice(index, delta)])
            if num_left or has_last:
                yield payload + tail
            else:
                yield payload + b"," + self._ending(run, with_usage=is_running)
        await run.complete()
        last = head + b"[]," + self._ending(run, with_usage=True) if has_last else b""
        yield last + _DONE

    def _ending(self, run: Run, *, with_usage: bool) -> bytes:
        ending: dict[str, Any] = {"usage": usage(run.record)} if with_usage else {}
        ending["manylora"] = extension(self.job.adapter, run.record)
        return orjson.dumps(ending)[1:] + b"\n\n"


class CompletionAnswer(Answer):
    """`text_completion`, with `echo`."""

    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"
    logprobs_kind = CompletionLogprobs

    def __init__(self, job: Job, codec: TextCodec, *, label: str, created: int, echo: bool) -> None:
        super().__init__(job, codec, label=label, created=created)
        self._echo = echo

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self.logprobs(index), "finish_reason": finish_reason}

    def chunk_choice(self, index: int, delta: Delta) -> dict[str, Any]:
        return self.choice(index, delta.text, delta.finish_reason)

    def deltas(self, run: Run) -> AsyncGenerator[tuple[int, Delta], None]:
        return self._echoed(run.deltas()) if self._echo else run.deltas()

    async def _echoed(self, deltas: AsyncGenerator[tuple[int, Delta], None]) -> AsyncGenerator[tuple[int, Delta], None]:
        """Puts the prompt before each choice's first delta.

        The prompt's log-probabilities come with choice 0 of its prompt; deltas of the other choices that come
        earlier wait for them.
        """
        scored: dict[int, tuple[TokenLogprob, ...]] = {}
        begun: set[int] = set()
        waiting: dict[int, list[tuple[int, Delta]]] = {}
        async for index, delta in deltas:
            prompt, number = divmod(index, self.job.n)
            if number == 0 and prompt not in scored:
                scored[prompt] = delta.prompt_logprobs
            elif prompt not in scored:
                waiting.setdefault(prompt, []).append((index, delta))
                continue
            for ready, held in [(index, delta), *waiting.pop(prompt, [])]:
                if ready not in begun:
                    begun.add(ready)
                    held = replace(
                        held,
                        text=self.job.prompts[prompt].text + held.text,
                        logprobs=(*scored[prompt], *held.logprobs),
                    )
                yield ready, held


class ChatAnswer(Answer):
    """`chat.completion` and its chunks."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    logprobs_kind = ChatLogprobs

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self.logprobs(index),
            "finish_reason": finish_reason,
        }

    def chunk_choice(self, index: int, delta: Delta) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"content": delta.text},
            "logprobs": self.logprobs(index),
            "finish_reason": delta.finish_reason,
        }

    def first_choices(self) -> list[dict[str, Any]]:
        role = {"role": "assistant", "content": "", "refusal": None}
        return [
            {"index": index, "delta": role, "logprobs": None, "finish_reason": None}
            for index in range(self.job.num_choices)
        ]


def usage(record: RequestRecord) -> dict[str, Any]:
    """OpenAI's `usage`."""
    return {
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "total_tokens": record.prompt_tokens + record.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": record.cached_tokens},
    }


def extension(adapter: AdapterRef | None, record: RequestRecord) -> dict[str, Any]:
    """The `manylora` block: who answered, and where the time before the first token went."""
    timing = record.timing()
    assert timing is not None, "an answer ends after its first delta"
    named = {"name": adapter.name, "version": adapter.version, "digest": adapter.digest} if adapter else None
    return {
        "adapter": named,
        "queue_ms": round(timing.queue_ms, 3),
        "load_ms": round(timing.load_ms, 3),
        "load_tier": timing.load_tier,
        "ttft_ms": round(timing.ttft_ms, 3),
    }
