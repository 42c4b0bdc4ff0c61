"""Answers in the words of Text Generation Inference and of LoRAX: whole, and an event for each token.

LoRAX's answers are TGI's with a few fields more, so one shape serves the clients of both.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import orjson

from manylora.api.answers import extension
from manylora.api.errors import tgi_error
from manylora.api.run import Deltas, Run
from manylora.api.token_details import finite
from manylora.engine.interface import Delta, FinishReason, TokenLogprob
from manylora.errors import ManyloraError

__all__ = ["UINT64", "GenerateAnswer", "Shape"]

# A prompt's tokens come all at once. So many are put into JSON at a time, a millisecond's work.
_TOKENS_AT_ONCE: Final = 64
UINT64: Final = 2**64


@dataclass(frozen=True, slots=True)
class Shape:
    """What an answer is to hold. `inputs`: what stands before each text."""

    is_listed: bool = False
    inputs: str = ""
    has_details: bool = False
    num_top: int = 0
    num_alternatives: int = 0

    def for_request(self, **what: Any) -> "Shape":
        return replace(self, **what)


@dataclass(slots=True)
class _Choice:
    """One of `best_of` answers, as far as it has come."""

    texts: list[str] = field(default_factory=list)
    tokens: list[bytes] = field(default_factory=list)  # JSON
    top_tokens: list[bytes] = field(default_factory=list)
    logprob: float = 0.0  # of all tokens
    num_tokens: int = 0
    finish_reason: str = ""

    @property
    def mean_logprob(self) -> float:
        return self.logprob / max(1, self.num_tokens)


class GenerateAnswer:
    """Implements `run.Renderer`.

    The texts of a stream's tokens, joined without those of special ones, are the answer: a character that takes
    several tokens is the last one's, and so is text that was held back because a stop string might have begun.
    """

    def __init__(self, run: Run, shape: Shape) -> None:
        self._run = run
        self._shape = shape
        self._codec = run.codec
        self._choices = [_Choice() for _ in range(run.num_choices)]
        params = run.prompts[0].params
        # Of an answer by chance; the clients know it as an unsigned number.
        self._seed = params.seed % UINT64 if params.temperature and params.seed is not None else None
        self._prefill: list[bytes] = []
        self._fresh: Sequence[TokenLogprob] = ()
        # An answer that is held to a grammar can end without another token, and the last event has one.
        self._holds_back = run.prompts[0].params.grammar is not None
        self._held: dict[str, Any] | None = None

    async def _arranged(self, deltas: Deltas) -> Deltas:
        async for index, delta in deltas:
            for start in range(0, len(delta.prompt_logprobs), _TOKENS_AT_ONCE):
                began = time.perf_counter()
                part = delta.prompt_logprobs[start : start + _TOKENS_AT_ONCE]
                self._prefill += map(orjson.dumps, map(self._prompt_token, part))
                if start + _TOKENS_AT_ONCE < len(delta.prompt_logprobs):
                    await asyncio.sleep(time.perf_counter() - began)
            yield index, delta

    def arranged(self, deltas: Deltas) -> Deltas:
        return self._arranged(deltas)

    async def keep(self, choice: int, logprobs: Sequence[TokenLogprob]) -> None:
        self._fresh = logprobs

    def add(self, choice: int, delta: Delta) -> None:
        kept = self._choices[choice]
        self._take(kept, delta)
        for token, top in self._tokens(kept, delta):
            kept.tokens.append(orjson.dumps(token))
            if self._shape.num_top:
                kept.top_tokens.append(orjson.dumps(top))

    def whole(self) -> bytes:
        best = max(self._choices, key=lambda choice: choice.mean_logprob)
        answer: dict[str, Any] = {"generated_text": self._text(best)}
        if self._shape.has_details:
            answer["details"] = {"prompt_tokens": len(self._run.prompts[0].ids), **self._details(best)}
            if len(self._choices) > 1:
                others = [choice for choice in self._choices if choice is not best]
                answer["details"]["best_of_sequences"] = [
                    {"generated_text": self._text(choice), **self._details(choice)} for choice in others
                ]
        answer["manylora"] = extension(self._run)
        return orjson.dumps([answer] if self._shape.is_listed else answer)

    def events(self, choice: int, delta: Delta) -> Sequence[bytes]:
        kept = self._choices[choice]
        self._take(kept, delta)
        made = [] if self._held is None else [self._held]
        first = kept.num_tokens - len(delta.token_ids) + 1
        for index, (token, top) in enumerate(self._tokens(kept, delta), first):
            event = {"index": index, "token": token, "generated_text": None, "details": None}
            made.append(event | {"top_tokens": top} if self._shape.num_top else event)
        self._held = None
        if delta.finish_reason is not None:
            if made and not delta.token_ids:
                made[-1]["token"]["text"] += delta.text
            for last in made[-1:]:
                last |= self._ending(kept)
        elif self._holds_back and made:
            self._held = made.pop()
        return [orjson.dumps(event) for event in made]

    def last_events(self) -> Sequence[bytes]:
        return ()

    def failed(self, error: ManyloraError) -> Sequence[bytes]:
        return (orjson.dumps(tgi_error(error)),)

    # parts

    def _take(self, kept: _Choice, delta: Delta) -> None:
        kept.texts.append(delta.text)
        kept.num_tokens += len(delta.token_ids)
        if delta.finish_reason is FinishReason.LENGTH:
            kept.finish_reason = "length"
        elif delta.finish_reason is not None:
            kept.finish_reason = "eos_token" if delta.stop_reason is None else "stop_sequence"

    def _tokens(self, kept: _Choice, delta: Delta) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """Each of the delta's tokens, with the likeliest at its place."""
        fresh, self._fresh = self._fresh, ()
        if not fresh:
            return
        for entry, text in zip(fresh, self._shares(delta), strict=True):
            kept.logprob += entry.logprob or 0.0
            is_special = not text and self._is_special(entry.token_id)
            token = self._token(entry.token_id, entry.logprob, is_special=is_special)
            if not is_special:
                token["text"] = text
            top = [self._token(i, p, is_special=self._is_special(i)) for i, p in entry.top]
            if self._shape.num_alternatives:
                token["alternative_tokens"] = [
                    {name: each[name] for name in ("id", "text", "logprob")}
                    for each in top[: self._shape.num_alternatives]
                ]
            yield token, top[: self._shape.num_top]

    def _shares(self, delta: Delta) -> list[str]:
        """The delta's text, token by token as far as the tokens spell it, the rest with the last one."""
        shares, rest = [], delta.text
        for token_id in delta.token_ids[:-1]:
            text = self._codec.token_text(token_id)
            share = text if rest.startswith(text) else ""
            shares.append(share)
            rest = rest[len(share) :]
        return [*shares, rest]

    def _token(self, token_id: int, logprob: float | None, *, is_special: bool) -> dict[str, Any]:
        return {
            "id": token_id,
            "text": self._codec.token_text(token_id),
            "logprob": None if logprob is None else finite(logprob),
            "special": is_special,
        }

    def _prompt_token(self, entry: TokenLogprob) -> dict[str, Any]:
        token = self._token(entry.token_id, entry.logprob, is_special=False)
        del token["special"]
        return token

    def _is_special(self, token_id: int) -> bool:
        """Whether the answer's text does not show it, although it has one."""
        return bool(self._codec.token_bytes(token_id)) and not self._codec.decode([token_id], skip_special_tokens=True)

    def _text(self, choice: _Choice) -> str:
        return self._shape.inputs + "".join(choice.texts)

    def _details(self, choice: _Choice) -> dict[str, Any]:
        details: dict[str, Any] = {
            "finish_reason": choice.finish_reason,
            "generated_tokens": choice.num_tokens,
            "seed": self._seed,
            "prefill": _array(self._prefill),
            "tokens": _array(choice.tokens),
        }
        return details | {"top_tokens": _array(choice.top_tokens)} if self._shape.num_top else details

    def _ending(self, choice: _Choice) -> dict[str, Any]:
        num_prompt_tokens = len(self._run.prompts[0].ids)
        details = {
            "finish_reason": choice.finish_reason,
            "prompt_tokens": num_prompt_tokens,
            "input_length": num_prompt_tokens,
            "generated_tokens": choice.num_tokens,
            "seed": self._seed,
        }
        return {
            "generated_text": self._text(choice),
            "details": details if self._shape.has_details else None,
            "manylora": extension(self._run),
        }


def _array(pieces: Sequence[bytes]) -> orjson.Fragment:
    return orjson.Fragment(b"[" + b",".join(pieces) + b"]")
