"""Answers in the two shapes that OpenAI gave them: what the choices were given becomes bodies and events, and no more.

An answer keeps a state for each choice. Log-probabilities are made into JSON as they come, so that an answer with many
of them is put together in no time at its end.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Final

import orjson

from manylora.api.errors import error_json
from manylora.api.run import Deltas, Run
from manylora.api.said import Said
from manylora.api.schemas import ChatRequest, CompletionRequest
from manylora.api.token_details import LOWEST, TokenDetails, finite
from manylora.engine.interface import AdapterRef, Delta, TextCodec, TokenLogprob
from manylora.errors import ManyloraError

__all__ = ["Answer", "ChatAnswer", "CompletionAnswer", "extension"]

_DONE: Final = b"[DONE]"
# A prompt's log-probabilities come all at once. So many are put into JSON at a time, a millisecond's work.
_LOGPROBS_AT_ONCE: Final = 64


# log-probabilities


class LogprobsJson(ABC):
    """One choice's log-probabilities: `add` them as they come, `take` the JSON of all since the last time."""

    def __init__(self, codec: TextCodec, *, are_ids: bool = False, hidden: int | None = None) -> None:
        """With `are_ids` a token is written as `token_id:<id>`. Of the first `hidden` tokens, None for all, the text
        does not show those that are special.
        """
        self._codec = codec
        self._hidden = hidden
        self._text: Callable[[int], str] = _as_id if are_ids else codec.token_text

    @abstractmethod
    def add(self, logprobs: Sequence[TokenLogprob]) -> None: ...

    @abstractmethod
    def take(self) -> orjson.Fragment: ...


def _as_id(token_id: int) -> str:
    return f"token_id:{token_id}"


class _List:
    """A JSON array in pieces."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def extend(self, values: Iterable[Any]) -> None:
        piece = orjson.dumps(list(values))[1:-1]
        if piece:
            self._pieces.append(piece)

    def take(self) -> bytes:
        taken = b",".join(self._pieces)
        self._pieces.clear()
        return b"[" + taken + b"]"


class ChatLogprobs(LogprobsJson):
    """`{"content": [{token, logprob, bytes, top_logprobs}], "refusal": null}`."""

    def __init__(self, codec: TextCodec, *, are_ids: bool = False, hidden: int | None = None) -> None:
        super().__init__(codec, are_ids=are_ids, hidden=hidden)
        self._content = _List()

    def add(self, logprobs: Sequence[TokenLogprob]) -> None:
        self._content.extend(
            {
                **self._token(entry.token_id, entry.logprob or 0.0),
                "top_logprobs": [self._token(token_id, logprob) for token_id, logprob in entry.top],
            }
            for entry in logprobs
        )

    def take(self) -> orjson.Fragment:
        return orjson.Fragment(b'{"content":' + self._content.take() + b',"refusal":null}')

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": self._text(token_id), "logprob": finite(logprob), "bytes": self._codec.token_bytes(token_id)}


class CompletionLogprobs(LogprobsJson):
    """`{tokens, token_logprobs, top_logprobs, text_offset}`, each a list.

    `text_offset` is the place of the token's first character in the choice's text. A token that begins within
    a character points at that character; a special token, which the text does not show, has no width.
    """

    def __init__(self, codec: TextCodec, *, are_ids: bool = False, hidden: int | None = None) -> None:
        super().__init__(codec, are_ids=are_ids, hidden=hidden)
        self._num_characters = 0
        self._num_tokens = 0
        self._lists = {name: _List() for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}

    def add(self, logprobs: Sequence[TokenLogprob]) -> None:
        text, lists = self._text, self._lists
        lists["tokens"].extend(text(entry.token_id) for entry in logprobs)
        lists["token_logprobs"].extend(None if e.logprob is None else finite(e.logprob) for e in logprobs)
        lists["top_logprobs"].extend(map(self._top, logprobs))
        lists["text_offset"].extend(self._offset(entry.token_id) for entry in logprobs)

    def take(self) -> orjson.Fragment:
        named = (b'"' + name.encode() + b'":' + values.take() for name, values in self._lists.items())
        return orjson.Fragment(b"{" + b",".join(named) + b"}")

    def _top(self, entry: TokenLogprob) -> dict[str, float] | None:
        """The likeliest tokens and the chosen one; of several ids with one text, the likeliest."""
        if entry.logprob is None:
            return None
        top: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            token = self._text(token_id)
            top[token] = max(top.get(token, LOWEST), finite(logprob))
        return top

    def _offset(self, token_id: int) -> int:
        codes = self._codec.token_bytes(token_id)
        is_hidden = self._hidden is None or self._num_tokens < self._hidden
        self._num_tokens += 1
        if is_hidden and codes and not self._codec.decode([token_id], skip_special_tokens=True):
            return self._num_characters
        begins_within = bool(codes) and _continues(codes[0]) and self._num_characters > 0
        offset = self._num_characters - begins_within
        self._num_characters += sum(not _continues(code) for code in codes)
        return offset


def _continues(code: int) -> bool:
    return code & 0xC0 == 0x80


# choices


class Choice(ABC):
    """One choice, and what has to be kept of it. `logprobs` is None where none were asked for."""

    def __init__(self, index: int, logprobs: LogprobsJson | None) -> None:
        self.index = index
        self.logprobs = logprobs
        self._texts: list[str] = []
        self._finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        self._texts.append(delta.text)
        self._finish_reason = delta.finish_reason

    def whole(self) -> dict[str, Any]:
        """The choice's part of a whole answer, from what was added."""
        return self._whole("".join(self._texts), self._finish_reason)

    @abstractmethod
    def _whole(self, text: str, finish_reason: str | None) -> dict[str, Any]: ...

    @abstractmethod
    def chunk(self, delta: Delta) -> dict[str, Any]:
        """The choice's part of a stream's event."""

    def opening(self) -> dict[str, Any] | None:
        """What a stream says of the choice before the first token."""
        return None

    def taken(self) -> orjson.Fragment | None:
        """The log-probabilities that came since the last time."""
        return None if self.logprobs is None else self.logprobs.take()


class CompletionChoice(Choice):
    """Of a `text_completion`, where whole and in parts are alike."""

    def _whole(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        return {"index": self.index, "text": text, "logprobs": self.taken(), "finish_reason": finish_reason}

    def chunk(self, delta: Delta) -> dict[str, Any]:
        return self._whole(delta.text, delta.finish_reason)


class ChatChoice(Choice):
    """Of a `chat.completion`. Where there is more in it than text, `said` reads it."""

    said: Said | None = None

    def add(self, delta: Delta) -> None:
        super().add(delta)
        if self.said is not None:
            self.said.read(delta)

    def _whole(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self.said is not None:
            finish_reason = self.said.finish_reason(finish_reason)
            message |= self.said.message()
        return {"index": self.index, "message": message, "logprobs": self.taken(), "finish_reason": finish_reason}

    def chunk(self, delta: Delta) -> dict[str, Any]:
        reason: str | None = delta.finish_reason
        if self.said is not None:
            reason = self.said.finish_reason(reason)
        return {
            "index": self.index,
            "delta": {"content": delta.text} if self.said is None else self.said.delta(),
            "logprobs": self.taken(),
            "finish_reason": reason,
        }

    def opening(self) -> dict[str, Any]:
        role = {"role": "assistant", "content": "", "refusal": None}
        return {"index": self.index, "delta": role, "logprobs": None, "finish_reason": None}


# answers


class Answer:
    """What both kinds share. Implements `run.Renderer`.

    With `include_usage` the last event has no choices but the usage, and all others have `usage: null`. With
    `continuous_usage_stats` each event has the usage so far. The last event, whichever it is, has the `manylora` block.
    """

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    choice_kind: ClassVar[type[Choice]]
    logprobs_kind: ClassVar[type[LogprobsJson]]
    has_prompt_in_choice: ClassVar[bool]  # what is told of a prompt's tokens is told in each choice

    def __init__(self, run: Run, body: CompletionRequest | ChatRequest) -> None:
        options = body.usage_in_stream
        self._run = run
        self._choices = [self.choice_kind(index, self._logprobs_of(index, body)) for index in range(run.num_choices)]
        self._details = TokenDetails(run, body, is_per_choice=self.has_prompt_in_choice)
        label = body.model or body.adapter_id or run.label
        self._named = {"id": f"{self.id_prefix}{run.id}", "created": int(time.time()), "model": label}
        self._head = orjson.dumps({**self._named, "object": self.chunk_object})[:-1] + b',"choices":'
        self._num_left = run.num_choices
        self._has_running_usage = options.continuous_usage_stats
        self._has_last_usage = options.include_usage
        self._tail = b',"usage":null}' if options.include_usage else b"}"
        self._opening = [opening for choice in self._choices if (opening := choice.opening()) is not None]

    def _logprobs_of(self, index: int, body: CompletionRequest | ChatRequest) -> LogprobsJson | None:
        prompt = self._run.prompts[index // self._run.n]
        if prompt.params.logprobs is None:
            return None
        hidden = None
        if not prompt.params.skip_special_tokens:  # of a prompt that is repeated, its text alone is shown
            hidden = len(prompt.ids) if isinstance(body, CompletionRequest) and body.echo else 0
        codec = self._run.codec
        return self.logprobs_kind(codec, are_ids=body.return_tokens_as_token_ids, hidden=hidden)

    def arranged(self, deltas: Deltas) -> Deltas:
        return self._details.kept(deltas)

    async def keep(self, choice: int, logprobs: Sequence[TokenLogprob]) -> None:
        """Put them into JSON; of many, with pauses as long as the work, so that nobody else waits for all of it."""
        kept = self._choices[choice].logprobs
        if kept is None:
            return
        for start in range(0, len(logprobs), _LOGPROBS_AT_ONCE):
            began = time.perf_counter()
            kept.add(logprobs[start : start + _LOGPROBS_AT_ONCE])
            if start + _LOGPROBS_AT_ONCE < len(logprobs):
                await asyncio.sleep(time.perf_counter() - began)

    def add(self, choice: int, delta: Delta) -> None:
        self._choices[choice].add(delta)
        self._details.add(choice, delta)

    def whole(self) -> bytes:
        return orjson.dumps(
            {
                **self._named,
                "object": self.whole_object,
                "choices": [{**choice.whole(), **self._details.of_choice(choice.index)} for choice in self._choices],
                **self._details.of_answer(),
                "usage": _usage(self._run),
                "manylora": extension(self._run),
            }
        )

    def events(self, choice: int, delta: Delta) -> Sequence[bytes]:
        """One event, none where nothing can be shown yet; before the first, what each choice opens with."""
        if delta.finish_reason is not None:
            self._num_left -= 1
        elif not (delta.text or delta.logprobs or self._opening or self._details.shows(delta)):
            return ()
        tail = b',"usage":' + orjson.dumps(_usage(self._run)) + b"}" if self._has_running_usage else self._tail
        event = self._head + orjson.dumps(
            [{**self._choices[choice].chunk(delta), **self._details.of_chunk(choice, delta)}]
        )
        if self._num_left or self._has_last_usage:
            event += tail
        else:
            event += b"," + self._ending(with_usage=self._has_running_usage)
        if not self._opening:
            return (event,)
        opening, self._opening = self._opening, []
        first = self._details.of_opening()
        return *(self._head + orjson.dumps([each]) + first + tail for each in opening), event

    def last_events(self) -> Sequence[bytes]:
        if not self._has_last_usage:
            return (_DONE,)
        return self._head + b"[]," + self._ending(with_usage=True), _DONE

    def failed(self, error: ManyloraError) -> Sequence[bytes]:
        return (error_json(error),)

    def _ending(self, *, with_usage: bool) -> bytes:
        ending: dict[str, Any] = {"usage": _usage(self._run)} if with_usage else {}
        ending["manylora"] = extension(self._run)
        return orjson.dumps(ending)[1:]


class ChatAnswer(Answer):
    """`chat.completion` and its chunks."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    choice_kind = ChatChoice
    logprobs_kind = ChatLogprobs
    has_prompt_in_choice = False

    def __init__(self, run: Run, body: ChatRequest) -> None:
        super().__init__(run, body)
        make = run.prompts[0].reader
        self._said = [] if make is None else [Said(make(), body.include_reasoning) for _ in self._choices]
        for choice, said in zip(self._choices, self._said, strict=False):
            assert isinstance(choice, ChatChoice)
            choice.said = said

    def events(self, choice: int, delta: Delta) -> Sequence[bytes]:
        if self._said:
            is_news = self._said[choice].read(delta)
            if not (is_news or delta.finish_reason or delta.logprobs or self._opening):
                return ()
        return super().events(choice, delta)


class CompletionAnswer(Answer):
    """`text_completion`, with `echo`."""

    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"
    choice_kind = CompletionChoice
    logprobs_kind = CompletionLogprobs
    has_prompt_in_choice = True

    def __init__(self, run: Run, body: CompletionRequest) -> None:
        super().__init__(run, body)
        self._echo = body.echo

    def arranged(self, deltas: Deltas) -> Deltas:
        arranged = super().arranged(deltas)
        return self._echoed(arranged) if self._echo else arranged

    async def _echoed(self, deltas: Deltas) -> Deltas:
        """Puts the prompt before each choice's first delta.

        The prompt's log-probabilities come with choice 0 of its prompt; deltas of the other choices that come
        earlier wait for them.
        """
        scored: dict[int, tuple[TokenLogprob, ...]] = {}
        begun: set[int] = set()
        waiting: dict[int, list[tuple[int, Delta]]] = {}
        async for index, delta in deltas:
            prompt, number = divmod(index, self._run.n)
            if number == 0 and prompt not in scored:
                most = self._run.prompts[prompt].params.logprobs
                scored[prompt] = tuple(replace(each, top=each.top[:most]) for each in delta.prompt_logprobs)
            elif prompt not in scored:
                waiting.setdefault(prompt, []).append((index, delta))
                continue
            for ready, held in [(index, delta), *waiting.pop(prompt, [])]:
                if ready not in begun:
                    begun.add(ready)
                    held = replace(
                        held,
                        text=self._run.prompts[prompt].text + held.text,
                        logprobs=(*scored[prompt], *held.logprobs),
                    )
                yield ready, held


def _usage(run: Run) -> dict[str, Any]:
    """OpenAI's `usage`, so far."""
    counts = run.counts
    rejected = counts.drafted_tokens - counts.accepted_tokens
    predicted = {"accepted_prediction_tokens": counts.accepted_tokens, "rejected_prediction_tokens": rejected}
    return {
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.completion_tokens,
        "total_tokens": counts.prompt_tokens + counts.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": counts.cached_tokens},
        **({"completion_tokens_details": predicted} if counts.drafted_tokens else {}),
    }


def _named(ref: AdapterRef) -> dict[str, Any]:
    return {"name": ref.name, "version": ref.version, "digest": ref.digest}


def extension(run: Run) -> dict[str, Any]:
    """The `manylora` block: who answered, and where the time before the first token went."""
    adapter, mix, timing = run.named.adapter, run.mix, run.counts.timing()
    assert timing is not None, "an answer ends after its first delta"
    parts = {"adapters": [{**_named(ref), "weight": weight} for ref, weight in mix.parts]}
    return {
        "adapter": None if adapter is None else _named(adapter),
        **({} if mix.is_plain else parts),
        "queue_ms": round(timing.queue_ms, 3),
        "load_ms": round(timing.load_ms, 3),
        "load_tier": timing.load_tier,
        "ttft_ms": round(timing.ttft_ms, 3),
    }
