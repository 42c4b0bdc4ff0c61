"""Answers as OpenAI's responses: the items that a choice becomes, whole, or event by event as they grow."""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeAlias

import orjson

from manylora.api.answers import extension
from manylora.api.response_items import sealed
from manylora.api.run import Deltas, Run
from manylora.api.said import Splitter
from manylora.api.schemas import ChatRequest
from manylora.api.token_details import logprob_json
from manylora.chat.pieces import Arguments, CallStart, Piece, Text
from manylora.engine.interface import Delta, FinishReason, TokenLogprob
from manylora.errors import ManyloraError

__all__ = ["ResponseAnswer", "Told"]

Event: TypeAlias = dict[str, Any]
"""An event without its number; `type` comes first."""

_CODES: Final = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


@dataclass(frozen=True, slots=True)
class Told:
    """What an answer has besides what was said. `echoed` is what it repeats of its request.

    With `has_summary` thoughts are the item's `summary`, otherwise its `content`; with `has_sealed` they are its
    `encrypted_content`, too. `namespaces` has, by what the model calls them, the functions that stand in one.
    """

    echoed: dict[str, Any]
    namespaces: Mapping[str, tuple[str, str]]
    has_summary: bool
    has_sealed: bool


# items


class Item(ABC):
    """One item of the output as it grows."""

    prefix: ClassVar[str]

    def __init__(self, answer_id: str, index: int) -> None:
        self.id = f"{self.prefix}_{answer_id}{index:04}"
        self.index = index
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @abstractmethod
    def shown(self, status: str, *, is_begun: bool = False) -> dict[str, Any]:
        """The item as it stands; as it begins, without what is in it."""

    @abstractmethod
    def opened(self) -> list[Event]:
        """Events behind the one that adds it."""

    @abstractmethod
    def grown(self, text: str, logprobs: list[bytes]) -> Event:
        """The event of some more text."""

    @abstractmethod
    def closed(self) -> list[Event]:
        """Events before the one that ends it."""

    def grow(self, text: str, logprobs: list[bytes]) -> Event:
        self._texts.append(text)
        return self.grown(text, logprobs)

    def _event(self, kind: str, **fields: Any) -> Event:
        return {"type": f"response.{kind}", "item_id": self.id, "output_index": self.index, **fields}


class MessageItem(Item):
    """What is said."""

    prefix = "msg"

    def __init__(self, answer_id: str, index: int) -> None:
        super().__init__(answer_id, index)
        self._logprobs: list[bytes] = []

    def shown(self, status: str, *, is_begun: bool = False) -> dict[str, Any]:
        content = [] if is_begun else [self._part(self.text, self._logprobs)]
        return {"id": self.id, "type": "message", "status": status, "role": "assistant", "content": content}

    def opened(self) -> list[Event]:
        return [self._event("content_part.added", content_index=0, part=self._part("", []))]

    def grown(self, text: str, logprobs: list[bytes]) -> Event:
        self._logprobs += logprobs
        return self._event("output_text.delta", content_index=0, delta=text, logprobs=_listed(logprobs))

    def closed(self) -> list[Event]:
        logprobs = _listed(self._logprobs)
        return [
            self._event("output_text.done", content_index=0, text=self.text, logprobs=logprobs),
            self._event("content_part.done", content_index=0, part=self._part(self.text, self._logprobs)),
        ]

    def _part(self, text: str, logprobs: list[bytes]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": _listed(logprobs)}


class CallItem(Item):
    """A call of a function."""

    prefix = "fc"

    def __init__(self, answer_id: str, index: int, start: CallStart, told: Told) -> None:
        super().__init__(answer_id, index)
        self._call_id = start.id
        namespace, self._name = told.namespaces.get(start.name, (None, start.name))
        self._namespace = {} if namespace is None else {"namespace": namespace}

    def shown(self, status: str, *, is_begun: bool = False) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "function_call",
            "status": status,
            "call_id": self._call_id,
            "name": self._name,
            **self._namespace,
            "arguments": "" if is_begun else self.text,
        }

    def opened(self) -> list[Event]:
        return []

    def grown(self, text: str, logprobs: list[bytes]) -> Event:
        return self._event("function_call_arguments.delta", delta=text)

    def closed(self) -> list[Event]:
        return [self._event("function_call_arguments.done", name=self._name, arguments=self.text)]


class ReasoningItem(Item):
    """What is thought."""

    prefix = "rs"

    def __init__(self, answer_id: str, index: int, told: Told) -> None:
        super().__init__(answer_id, index)
        self._told = told

    def shown(self, status: str, *, is_begun: bool = False) -> dict[str, Any]:
        in_summary = self._told.has_summary
        kind = "summary_text" if in_summary else "reasoning_text"
        thoughts = [] if is_begun else [{"type": kind, "text": self.text}]
        item: dict[str, Any] = {"id": self.id, "type": "reasoning", "status": status}
        item |= {"summary": thoughts} if in_summary else {"summary": [], "content": thoughts}
        return item | ({"encrypted_content": sealed(self.text)} if self._told.has_sealed and not is_begun else {})

    def opened(self) -> list[Event]:
        if self._told.has_summary:
            return [self._event("reasoning_summary_part.added", summary_index=0, part=self._part(""))]
        return [self._event("content_part.added", content_index=0, part=self._part(""))]

    def grown(self, text: str, logprobs: list[bytes]) -> Event:
        if self._told.has_summary:
            return self._event("reasoning_summary_text.delta", summary_index=0, delta=text)
        return self._event("reasoning_text.delta", content_index=0, delta=text)

    def closed(self) -> list[Event]:
        text, part = self.text, self._part(self.text)
        if self._told.has_summary:
            return [
                self._event("reasoning_summary_text.done", summary_index=0, text=text),
                self._event("reasoning_summary_part.done", summary_index=0, part=part),
            ]
        return [
            self._event("reasoning_text.done", content_index=0, text=text),
            self._event("content_part.done", content_index=0, part=part),
        ]

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "summary_text" if self._told.has_summary else "reasoning_text", "text": text}


def _listed(logprobs: list[bytes]) -> orjson.Fragment:
    return orjson.Fragment(b"[" + b",".join(logprobs) + b"]")


class Items:
    """All of them: pieces go in, and events of how the items grow come out. What came before `output` is closed."""

    def __init__(self, answer_id: str, told: Told) -> None:
        self._answer_id = answer_id
        self._told = told
        self._last: Item | None = None
        self.output: list[dict[str, Any]] = []

    def add(self, piece: Piece, logprobs: list[bytes]) -> list[Event]:
        item = self._last
        if isinstance(piece, CallStart):
            return self._begin(CallItem(self._answer_id, self._next, piece, self._told))
        kind = CallItem if isinstance(piece, Arguments) else MessageItem if isinstance(piece, Text) else ReasoningItem
        if isinstance(item, kind):
            return [item.grow(piece.text, logprobs)]
        begun: Item
        if isinstance(piece, Text):
            begun = MessageItem(self._answer_id, self._next)
        else:
            begun = ReasoningItem(self._answer_id, self._next, self._told)
        return [*self._begin(begun), begun.grow(piece.text, logprobs)]

    @property
    def _next(self) -> int:
        return len(self.output) + (self._last is not None)

    def _begin(self, item: Item) -> list[Event]:
        closing = self.close("completed")
        self._last = item
        shown = item.shown("in_progress", is_begun=True)
        added = {"type": "response.output_item.added", "output_index": item.index, "item": shown}
        return [*closing, added, *item.opened()]

    def close(self, status: str, logprobs: list[bytes] | None = None) -> list[Event]:
        """Ends the item that grows; `logprobs` are those of tokens without text at its end."""
        item, self._last = self._last, None
        if item is None:
            return []
        ended = [item.grow("", logprobs)] if logprobs and isinstance(item, MessageItem) else []
        shown = item.shown(status)
        self.output.append(shown)
        done = {"type": "response.output_item.done", "output_index": item.index, "item": shown}
        return [*ended, *item.closed(), done]

    def end(self, status: str, logprobs: list[bytes]) -> list[Event]:
        """Ends the output, in which there is at least one item."""
        begun = [] if self._last is not None else self._begin(MessageItem(self._answer_id, self._next))
        return [*begun, *self.close(status, logprobs)]


# the answer


class ResponseAnswer:
    """Implements `run.Renderer`. There is one choice.

    Log-probabilities belong to a message's text: those of tokens that become thoughts or a call are left out. Where one
    step brings both, all of its tokens count as text.
    """

    def __init__(self, run: Run, body: ChatRequest, told: Told) -> None:
        params = run.prompts[0].params
        make = run.prompts[0].reader
        self._run = run
        self._codec = run.codec
        self._splitter = Splitter(None if make is None else make(), has_reasoning=body.include_reasoning)
        self._items = Items(run.id, told)
        self._logprobs: list[bytes] = []  # of tokens that have become nothing yet
        self._finish_reason: FinishReason | None = None
        self._num_events = 0
        self._head = {
            "id": f"resp_{run.id}",
            "object": "response",
            "created_at": int(time.time()),
            "model": body.model or body.adapter_id or run.label,
            "temperature": params.temperature,
            "top_p": params.top_p,
            **told.echoed,
        }

    def arranged(self, deltas: Deltas) -> Deltas:
        return deltas

    async def keep(self, choice: int, logprobs: Sequence[TokenLogprob]) -> None:
        self._logprobs += [logprob_json(entry, self._codec) for entry in logprobs]

    def add(self, choice: int, delta: Delta) -> None:
        self._take(delta)

    def whole(self) -> bytes:
        return orjson.dumps(self._ended())

    def events(self, choice: int, delta: Delta) -> Sequence[bytes]:
        found = self._take(delta)
        return self._numbered([*self._opening(), *found]) if found else ()

    def last_events(self) -> Sequence[bytes]:
        response = self._ended()
        return self._numbered([{"type": f"response.{response['status']}", "response": response}])

    def failed(self, error: ManyloraError) -> Sequence[bytes]:
        code = _CODES.get(error.status, "server_error")
        told = {"code": code, "message": error.message, "type": error.type, "param": error.param}
        closing = self._items.close("incomplete")
        response = self._response("failed", output=self._items.output, error=told)
        return self._numbered([*self._opening(), *closing, {"type": "response.failed", "response": response}])

    # parts

    def _take(self, delta: Delta) -> list[Event]:
        events: list[Event] = []
        pieces = self._splitter.split(delta)
        for piece in pieces:
            taken: list[bytes] = []
            if isinstance(piece, Text):
                taken, self._logprobs = self._logprobs, []
            events += self._items.add(piece, taken)
        if pieces:
            self._logprobs = []
        if delta.finish_reason is not None:
            self._finish_reason = delta.finish_reason
            events += self._items.end(self._status, self._logprobs)
        return events

    @property
    def _status(self) -> str:
        return "incomplete" if self._finish_reason is FinishReason.LENGTH else "completed"

    def _opening(self) -> list[Event]:
        if self._num_events:
            return []
        response = self._response("in_progress", output=[])
        return [{"type": f"response.{kind}", "response": response} for kind in ("created", "in_progress")]

    def _numbered(self, events: list[Event]) -> list[bytes]:
        first = self._num_events
        self._num_events += len(events)
        return [
            orjson.dumps({"type": event["type"], "sequence_number": number, **event})
            for number, event in enumerate(events, first)
        ]

    def _ended(self) -> dict[str, Any]:
        is_whole = self._status == "completed"
        return self._response(
            self._status,
            output=self._items.output,
            completed_at=int(time.time()) if is_whole else None,
            incomplete_details=None if is_whole else {"reason": "max_output_tokens"},
            usage=self._usage(),
            manylora=extension(self._run),
        )

    def _response(self, status: str, *, output: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        rest = {"completed_at": None, "error": None, "incomplete_details": None, "usage": None}
        return {**self._head, "status": status, "output": output, **rest, **more}

    def _usage(self) -> dict[str, Any]:
        counts = self._run.counts
        return {
            "input_tokens": counts.prompt_tokens,
            "input_tokens_details": {"cached_tokens": counts.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": counts.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._splitter.num_reasoning_tokens},
            "total_tokens": counts.prompt_tokens + counts.completion_tokens,
        }
