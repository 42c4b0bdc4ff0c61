"""Answers as Anthropic's messages: the blocks that a choice becomes, whole, or event by event as they grow."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import orjson

from manylora.api.answers import extension
from manylora.api.errors import anthropic_error
from manylora.api.run import Deltas, Run
from manylora.api.said import Splitter, arguments_of
from manylora.api.schemas import ChatRequest
from manylora.api.sse import TypedEventStream
from manylora.chat.pieces import Arguments, CallStart, Piece, Text
from manylora.engine.interface import Delta, FinishReason, TokenLogprob
from manylora.errors import ManyloraError

__all__ = ["MessageAnswer", "MessageStream"]

Event: TypeAlias = dict[str, Any]
"""An event; `type` comes first."""

_DELTAS: Final = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}


class MessageStream(TypedEventStream):
    """A stream of Messages. Its sign of life is an event that Anthropic's clients know."""

    comment = b'event: ping\ndata: {"type":"ping"}\n\n'


@dataclass(slots=True)
class Block:
    """One block of the content as it grows. `begun` is how it begins."""

    begun: dict[str, Any]
    texts: list[str]

    @property
    def kind(self) -> str:
        kind: str = self.begun["type"]
        return kind

    def shown(self) -> dict[str, Any]:
        """The block as it stands."""
        text = "".join(self.texts)
        if self.kind == "tool_use":
            return {**self.begun, "input": arguments_of(text)}
        return {**self.begun, _DELTAS[self.kind][1]: text}


class Blocks:
    """All of them: pieces go in, and events of how the blocks grow come out."""

    def __init__(self, signature: str) -> None:
        """`signature` is what thoughts carry; clients that send thoughts back insist on one."""
        self._signature = signature
        self._blocks: list[Block] = []
        self._is_open = False

    @property
    def has_calls(self) -> bool:
        return any(block.kind == "tool_use" for block in self._blocks)

    def content(self) -> list[dict[str, Any]]:
        signed = {"signature": self._signature}
        return [{**block.shown(), **(signed if block.kind == "thinking" else {})} for block in self._blocks]

    def add(self, piece: Piece) -> list[Event]:
        if isinstance(piece, CallStart):
            return self._begin({"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}})
        kind = "tool_use" if isinstance(piece, Arguments) else "text" if isinstance(piece, Text) else "thinking"
        begun: list[Event] = []
        if not (self._is_open and self._blocks[-1].kind == kind):
            fields = {"text": ""} if kind == "text" else {"thinking": "", "signature": ""}
            begun = self._begin({"type": kind, **fields})
        self._blocks[-1].texts.append(piece.text)
        name, field = _DELTAS[kind]
        return [*begun, self._event("content_block_delta", delta={"type": name, field: piece.text})]

    def _begin(self, block: dict[str, Any]) -> list[Event]:
        closing = self.close()
        self._is_open = True
        self._blocks.append(Block(block, []))
        return [*closing, self._event("content_block_start", content_block=block)]

    def close(self) -> list[Event]:
        """Ends the block that grows."""
        if not self._is_open:
            return []
        self._is_open = False
        stop = self._event("content_block_stop")
        if self._blocks[-1].kind != "thinking":
            return [stop]
        signed = {"type": "signature_delta", "signature": self._signature}
        return [self._event("content_block_delta", delta=signed), stop]

    def _event(self, kind: str, **fields: Any) -> Event:
        return {"type": kind, "index": len(self._blocks) - 1, **fields}


class MessageAnswer:
    """Implements `run.Renderer`. There is one choice."""

    def __init__(self, run: Run, body: ChatRequest) -> None:
        make = run.prompts[0].reader
        self._run = run
        self._asked = body.token_limit
        self._splitter = Splitter(None if make is None else make(), has_reasoning=body.include_reasoning)
        self._blocks = Blocks(run.id)
        self._is_begun = False
        self._stopped: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}
        self._head = {
            "id": f"msg_{run.id}",
            "type": "message",
            "role": "assistant",
            "model": body.model or body.adapter_id or run.label,
        }

    def arranged(self, deltas: Deltas) -> Deltas:
        return deltas

    async def keep(self, choice: int, logprobs: Sequence[TokenLogprob]) -> None:
        """Log-probabilities are dropped: the Messages API has none."""

    def add(self, choice: int, delta: Delta) -> None:
        self._take(delta)

    def whole(self) -> bytes:
        return orjson.dumps(
            {
                **self._head,
                "content": self._blocks.content(),
                **self._stopped,
                "usage": self._usage(),
                "manylora": extension(self._run),
            }
        )

    def events(self, choice: int, delta: Delta) -> Sequence[bytes]:
        found = self._take(delta)
        if not found and delta.finish_reason is None:
            return ()
        begun = [] if self._is_begun else [self._start()]
        self._is_begun = True
        return [orjson.dumps(event) for event in (*begun, *found)]

    def last_events(self) -> Sequence[bytes]:
        delta = {
            "type": "message_delta",
            "delta": self._stopped,
            "usage": self._usage(),
            "manylora": extension(self._run),
        }
        return orjson.dumps(delta), orjson.dumps({"type": "message_stop"})

    def failed(self, error: ManyloraError) -> Sequence[bytes]:
        return (orjson.dumps(anthropic_error(error)),)

    # parts

    def _start(self) -> Event:
        nothing: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        return {"type": "message_start", "message": {**self._head, **nothing, "usage": self._usage()}}

    def _take(self, delta: Delta) -> list[Event]:
        events = [event for piece in self._splitter.split(delta) for event in self._blocks.add(piece)]
        if delta.finish_reason is None:
            return events
        self._stopped["stop_reason"] = self._reason(delta)
        if self._stopped["stop_reason"] == "stop_sequence":
            self._stopped["stop_sequence"] = delta.stop_reason
        return [*events, *self._blocks.close()]

    def _reason(self, delta: Delta) -> str:
        if delta.finish_reason is FinishReason.LENGTH:
            is_context = self._asked is not None and self._run.prompts[0].params.max_tokens < self._asked
            return "model_context_window_exceeded" if is_context else "max_tokens"
        if isinstance(delta.stop_reason, str):
            return "stop_sequence"
        return "tool_use" if self._blocks.has_calls else "end_turn"

    def _usage(self) -> dict[str, Any]:
        """Tokens so far. `input_tokens` are those that were not in the cache."""
        counts = self._run.counts
        return {
            "input_tokens": counts.prompt_tokens - counts.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": counts.cached_tokens,
            "output_tokens": counts.completion_tokens,
            "output_tokens_details": {"thinking_tokens": self._splitter.num_reasoning_tokens},
            "service_tier": "standard",
        }
