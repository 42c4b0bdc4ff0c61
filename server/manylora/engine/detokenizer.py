"""Token ids become text as they come, in whole characters, and stop strings are found across token borders."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

CONTEXT_TOKENS = 6  # tokens of the prompt decoded with the first output, for the spaces between words
INCOMPLETE = "\ufffd"  # what a decoder writes for bytes that are no whole character yet


class Detokenizer:
    """One sequence's text.

    Decoding a token alone loses the spaces and splits characters that take several tokens, so a window of
    earlier tokens is decoded with and without the new ones, and the difference is the new text.
    """

    def __init__(self, decode: Decode, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._prefix = 0
        self._read = len(self._ids)
        self._stop = tuple(stop)
        self._held = ""
        self.is_stopped = False

    def add(self, token_ids: Sequence[int]) -> str:
        """Text that is certain after these tokens. Nothing comes any more once `is_stopped`."""
        self._ids.extend(token_ids)
        before = self._decode(self._ids[self._prefix : self._read])
        now = self._decode(self._ids[self._prefix :])
        if len(now) <= len(before) or now.endswith(INCOMPLETE):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return self._emit(now[len(before) :])

    def flush(self) -> str:
        """What was still held back, at the end: incomplete characters become U+FFFD."""
        if self.is_stopped:
            return ""
        before = self._decode(self._ids[self._prefix : self._read])
        rest = self._decode(self._ids[self._prefix :])[len(before) :]
        self._prefix = self._read = len(self._ids)
        text = self._emit(rest)
        if self.is_stopped:
            return text
        text, self._held = text + self._held, ""
        return text

    def _emit(self, text: str) -> str:
        if not self._stop:
            return text
        pending = self._held + text
        found = [i for i in (pending.find(s) for s in self._stop) if i >= 0]
        if found:
            self.is_stopped = True
            self._held = ""
            return pending[: min(found)]
        keep = max(_overlap(pending, s) for s in self._stop)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[len(text) - n :])), 0)
