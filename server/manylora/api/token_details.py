"""What vLLM's fields tell of an answer's tokens, where asked for: `token_ids`, `prompt_token_ids`, `prompt_logprobs`.

Of completions each choice has what is told of its prompt, of a chat the answer has it.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Final

import orjson

from manylora.api.run import Deltas, Run
from manylora.api.schemas import GenerationRequest
from manylora.engine.interface import Delta, TextCodec, TokenLogprob

__all__ = ["LOWEST", "TokenDetails", "finite", "logprob_json"]

LOWEST: Final = -9999.0  # JSON has no -inf
# A prompt's log-probabilities come all at once. So many are put into JSON at a time, a millisecond's work.
_LOGPROBS_AT_ONCE: Final = 64


def finite(logprob: float) -> float:
    """A log-probability as JSON can have it."""
    return max(LOWEST, logprob)  # of NaN too, which compares false


def logprob_json(entry: TokenLogprob, codec: TextCodec) -> bytes:
    """`{token, logprob, bytes, top_logprobs: [{token, logprob, bytes}]}`."""

    def told(token_id: int, logprob: float) -> dict[str, Any]:
        token = codec.token_text(token_id)
        return {"token": token, "logprob": finite(logprob), "bytes": codec.token_bytes(token_id)}

    own = told(entry.token_id, entry.logprob or 0.0)
    return orjson.dumps({**own, "top_logprobs": [told(*each) for each in entry.top]})


class TokenDetails:
    """The details of one answer. `is_per_choice`: what is told of a prompt stands in each of its choices."""

    def __init__(self, run: Run, body: GenerationRequest, *, is_per_choice: bool) -> None:
        self._run = run
        self._has_ids = body.return_token_ids
        self._num_prompt_logprobs = body.prompt_logprobs
        self._is_per_choice = is_per_choice
        self._ids: list[list[int]] = [[] for _ in range(run.num_choices)] if self._has_ids else []
        self._prompt_ids: dict[int, orjson.Fragment] = {}
        self._prompt_logprobs: dict[int, orjson.Fragment] = {}
        self._begun: set[int] = set()  # choices of a stream

    def kept(self, deltas: Deltas) -> Deltas:
        """The deltas as they are; what they say of prompts is put into JSON on the way."""
        return deltas if self._num_prompt_logprobs is None else self._keeping(deltas, self._num_prompt_logprobs)

    async def _keeping(self, deltas: Deltas, num_top: int) -> Deltas:
        codec = self._run.codec
        async for choice, delta in deltas:
            prompt, number = divmod(choice, self._run.n)
            if number == 0 and prompt not in self._prompt_logprobs:
                self._prompt_logprobs[prompt] = await _prompt_json(delta.prompt_logprobs, num_top, codec)
            yield choice, delta

    # a whole answer

    def add(self, choice: int, delta: Delta) -> None:
        """Take in a delta of an answer that is sent whole."""
        if self._has_ids:
            self._ids[choice] += delta.token_ids

    def of_choice(self, choice: int) -> dict[str, Any]:
        told = self._of_prompt(choice // self._run.n) if self._is_per_choice else {}
        return told | ({"token_ids": self._ids[choice]} if self._has_ids else {})

    def of_answer(self) -> dict[str, Any]:
        return {} if self._is_per_choice else self._of_prompt(0)

    def _of_prompt(self, prompt: int) -> dict[str, Any]:
        told: dict[str, Any] = {}
        if self._num_prompt_logprobs is not None:
            told["prompt_logprobs"] = self._prompt_logprobs[prompt]
        if self._has_ids:
            told["prompt_token_ids"] = self._ids_of(prompt)
        return told

    def _ids_of(self, prompt: int) -> orjson.Fragment:
        if prompt not in self._prompt_ids:
            self._prompt_ids[prompt] = orjson.Fragment(orjson.dumps(self._run.prompts[prompt].ids))
        return self._prompt_ids[prompt]

    # a stream

    def shows(self, delta: Delta) -> bool:
        """Whether an event is sent for a delta without text."""
        return self._has_ids and bool(delta.token_ids)

    def of_chunk(self, choice: int, delta: Delta) -> dict[str, Any]:
        if not self._has_ids:
            return {}
        told: dict[str, Any] = {"token_ids": delta.token_ids}
        if self._is_per_choice and choice not in self._begun:
            self._begun.add(choice)
            told["prompt_token_ids"] = self._ids_of(choice // self._run.n)
        return told

    def of_opening(self) -> bytes:
        """What the events before the first token have besides, as the inside of a JSON object."""
        if not self._has_ids or self._is_per_choice:
            return b""
        return b"," + orjson.dumps({"prompt_token_ids": self._ids_of(0)})[1:-1]


async def _prompt_json(entries: Sequence[TokenLogprob], num_top: int, codec: TextCodec) -> orjson.Fragment:
    """A list with an object for each token of a prompt, null for the first; with pauses as long as the work."""
    pieces = []
    for start in range(0, len(entries), _LOGPROBS_AT_ONCE):
        began = time.perf_counter()
        part = [_place(entry, num_top, codec) for entry in entries[start : start + _LOGPROBS_AT_ONCE]]
        pieces.append(orjson.dumps(part)[1:-1])
        if start + _LOGPROBS_AT_ONCE < len(entries):
            await asyncio.sleep(time.perf_counter() - began)
    return orjson.Fragment(b"[" + b",".join(pieces) + b"]")


def _place(entry: TokenLogprob, num_top: int, codec: TextCodec) -> dict[str, Any] | None:
    """The prompt's own token and the likeliest in its place, by their ids."""
    if entry.logprob is None:
        return None
    told = {entry.token_id: (entry.logprob, entry.rank)}
    told |= {token_id: (logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top[:num_top], 1)}
    return {
        str(token_id): {"logprob": finite(logprob), "rank": rank, "decoded_token": codec.token_text(token_id)}
        for token_id, (logprob, rank) in told.items()
    }
