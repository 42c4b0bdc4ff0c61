"""Log-probabilities in the two shapes that OpenAI gave them.

They are made into JSON as they come, so that an answer with many of them is put together in no time at its end.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from manylora.engine.interface import TextCodec, TokenLogprob

__all__ = ["ChatLogprobs", "CompletionLogprobs", "LogprobsJson"]

_LOWEST = -9999.0  # JSON has no -inf


def _finite(logprob: float) -> float:
    return max(_LOWEST, logprob)  # of NaN too, which compares false


class LogprobsJson:
    """One choice's log-probabilities: `add` them as they come, `take` the JSON of all since the last time."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec

    def add(self, logprobs: Sequence[TokenLogprob]) -> None:
        raise NotImplementedError

    def take(self) -> orjson.Fragment:
        raise NotImplementedError


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

    def __init__(self, codec: TextCodec) -> None:
        super().__init__(codec)
        self._content = _List()

    def add(self, logprobs: Sequence[TokenLogprob]) -> None:
        self._content.extend(
            {
                **_chat_token(self._codec, entry.token_id, entry.logprob or 0.0),
                "top_logprobs": [_chat_token(self._codec, token_id, logprob) for token_id, logprob in entry.top],
            }
            for entry in logprobs
        )

    def take(self) -> orjson.Fragment:
        return orjson.Fragment(b'{"content":' + self._content.take() + b',"refusal":null}')


def _chat_token(codec: TextCodec, token_id: int, logprob: float) -> dict[str, Any]:
    return {"token": codec.token_text(token_id), "logprob": _finite(logprob), "bytes": codec.token_bytes(token_id)}


class CompletionLogprobs(LogprobsJson):
    """`{tokens, token_logprobs, top_logprobs, text_offset}`, each a list.

    `text_offset` is the place of the token's first character in the choice's text. A token that begins within
    a character points at that character; a special token, which the text does not show, has no width.
    """

    def __init__(self, codec: TextCodec) -> None:
        super().__init__(codec)
        self._num_characters = 0
        self._lists = {name: _List() for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}

    def add(self, logprobs: Sequence[TokenLogprob]) -> None:
        text, lists = self._codec.token_text, self._lists
        lists["tokens"].extend(text(entry.token_id) for entry in logprobs)
        lists["token_logprobs"].extend(None if e.logprob is None else _finite(e.logprob) for e in logprobs)
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
            token = self._codec.token_text(token_id)
            top[token] = max(top.get(token, _LOWEST), _finite(logprob))
        return top

    def _offset(self, token_id: int) -> int:
        codes = self._codec.token_bytes(token_id)
        if codes and not self._codec.decode([token_id], skip_special_tokens=True):
            return self._num_characters
        begins_within = bool(codes) and _continues(codes[0]) and self._num_characters > 0
        offset = self._num_characters - begins_within
        self._num_characters += sum(not _continues(code) for code in codes)
        return offset


def _continues(code: int) -> bool:
    return code & 0xC0 == 0x80
