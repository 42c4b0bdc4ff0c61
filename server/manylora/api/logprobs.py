"""Log-probabilities in the two shapes that OpenAI gave them."""

from collections.abc import Sequence
from typing import Any

from manylora.engine.interface import TextCodec, TokenLogprob

__all__ = ["CompletionLogprobs", "chat_logprobs"]

_LOWEST = -9999.0  # JSON has no -inf


def _finite(logprob: float) -> float:
    return max(_LOWEST, logprob)  # of NaN too, which compares false


def chat_logprobs(codec: TextCodec, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """`{"content": [{token, logprob, bytes, top_logprobs}], "refusal": null}`."""
    return {
        "content": [
            {
                **_chat_token(codec, entry.token_id, entry.logprob or 0.0),
                "top_logprobs": [_chat_token(codec, token_id, logprob) for token_id, logprob in entry.top],
            }
            for entry in logprobs
        ],
        "refusal": None,
    }


def _chat_token(codec: TextCodec, token_id: int, logprob: float) -> dict[str, Any]:
    return {"token": codec.token_text(token_id), "logprob": _finite(logprob), "bytes": codec.token_bytes(token_id)}


class CompletionLogprobs:
    """Renders one choice's log-probabilities, in as many pieces as the stream needs.

    `text_offset` is the place of the token's first character in the choice's text. A token that begins within
    a character points at that character; a special token, which the text does not show, has no width.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._num_characters = 0

    def render(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        text = self._codec.token_text
        return {
            "tokens": [text(entry.token_id) for entry in logprobs],
            "token_logprobs": [None if entry.logprob is None else _finite(entry.logprob) for entry in logprobs],
            "top_logprobs": [self._top(entry) for entry in logprobs],
            "text_offset": [self._offset(entry.token_id) for entry in logprobs],
        }

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
