"""Token ids become text as they come, in whole characters, and stop strings are found across token borders."""

from collections.abc import Callable, Sequence
from functools import lru_cache

Decode = Callable[..., str]
"""Token ids, and perhaps `skip_special_tokens=False`, to their text."""

CONTEXT_TOKENS = 6  # tokens of the prompt decoded with the first output, for the spaces between words
MAX_BYTES = 4  # of one character in UTF-8
MAX_PENDING = 8  # tokens that may wait for the end of a character
INCOMPLETE = "\ufffd"  # what a decoder writes for bytes that are no whole character yet


class Detokenizer:
    """One sequence's text.

    Decoding a token alone loses the spaces and splits characters that take several tokens, so a window of
    earlier tokens is decoded with and without the new ones, and the difference is the new text.

    The text ends before the first of the strings `stop`, behind it with `include_stop`. One that ends in the text of
    the first `min_tokens` tokens does not count.
    """

    def __init__(
        self,
        decode: Decode,
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        include_stop: bool = False,
    ) -> None:
        self._decode = decode
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._prefix = 0
        self._read = len(self._ids)
        self._stop = tuple(stop)
        self._begun = [_Begun(s) for s in self._stop]
        self._held = ""
        self._num_early = min_tokens  # tokens to come whose text ends nothing
        self._is_early = False  # the last ones were among them
        self._include_stop = include_stop
        self.stopped_by: str | None = None

    @property
    def is_stopped(self) -> bool:
        return self.stopped_by is not None

    def add(self, token_ids: Sequence[int]) -> str:
        """Text that is certain after these tokens. Nothing comes any more once `is_stopped`."""
        self._is_early = self._num_early >= len(token_ids)
        self._num_early -= min(self._num_early, len(token_ids))
        self._ids.extend(token_ids)
        end = len(self._ids)
        new = self._new_text(end)
        if new.endswith(INCOMPLETE):
            end = self._certain_end()
            new = self._new_text(end)
        if not new:
            return ""
        self._prefix, self._read = self._read, end
        return self._emit(new)

    def flush(self) -> str:
        """What was still held back, at the end: incomplete characters become U+FFFD."""
        if self.is_stopped:
            return ""
        rest = self._new_text(len(self._ids))
        self._prefix = self._read = len(self._ids)
        text = self._emit(rest)
        if self.is_stopped:
            return text
        text, self._held = text + self._held, ""
        return text

    def _new_text(self, end: int) -> str:
        """The text of the tokens from `_read` to `end`."""
        before = self._decode(self._ids[self._prefix : self._read])
        now = self._decode(self._ids[self._prefix : end])
        if before.endswith(INCOMPLETE):  # a character begun in the prompt may have become whole
            return now[_num_common(before, now) :]
        return now[len(before) :]

    def _certain_end(self) -> int:
        """How far the pending tokens are certain, although they end inside a character.

        Nothing is, unless there are more than a character can take: then they hold bytes that belong to none,
        and waiting for the end of those would make the window longer with every step.
        """
        end = len(self._ids)
        if end - self._read <= MAX_PENDING:
            return self._read
        now = self._decode(self._ids[self._prefix :])
        for cut in range(end - MAX_BYTES + 1, self._read, -1):
            if self._decode(self._ids[self._prefix : cut]) + self._decode(self._ids[cut:]) == now:
                return cut
        return self._read

    def _emit(self, text: str) -> str:
        if not self._stop:
            return text
        num_held, pending = len(self._held), self._held + text
        # What is held back may hold a whole one, if that came too early.
        starts = () if self._is_early else ((pending.find(s, max(0, num_held - len(s) + 1)), s) for s in self._stop)
        found = [(i + len(s), i) for i, s in starts if i >= 0]
        if found:  # the one that is complete first, so that it does not matter how the text was cut
            end, start = min(found)
            self.stopped_by = pending[start:end]
            self._held = ""
            return pending[: end if self._include_stop else start]
        keep = max(begun.after(text) for begun in self._begun)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]


class _Begun:
    """How much of one stop string the text ends with: Knuth, Morris and Pratt's way, a few steps for a character.

    Looking at the end of the text anew with each token takes time in proportion to the stop string, and there may be
    many long ones.
    """

    __slots__ = ("_borders", "_length", "_stop")

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self._borders = _borders(stop)
        self._length = 0

    def after(self, text: str) -> int:
        """Length of the longest end of all text so far that is a beginning of the stop string, but not all of it."""
        stop, borders, length = self._stop, self._borders, self._length
        if not length and stop[0] not in text:
            return 0
        for character in text:
            while length and stop[length] != character:
                length = borders[length]
            length += stop[length] == character
            if length == len(stop):
                length = borders[length]
        self._length = length
        return length


@lru_cache(1024)
def _borders(stop: str) -> tuple[int, ...]:
    """Of each beginning of `stop`, by its length: the longest shorter beginning that it ends with."""
    borders = [0, 0]
    for character in stop[1:]:
        length = borders[-1]
        while length and stop[length] != character:
            length = borders[length]
        borders.append(length + (stop[length] == character))
    return tuple(borders)


def _num_common(a: str, b: str) -> int:
    """Length of the longest beginning that both have."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
