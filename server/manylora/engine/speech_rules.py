"""Which tokens may come next in a transcript, as Whisper's own decoding has it (Radford et al., 2022).

A transcript may begin with tokens that say what language is heard. Then comes text, or with timestamps a time, text and
a time again: times come in pairs but at the ends and never go back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from manylora.engine.token_rules import Bits, clear_bits, clear_range, open_bits, set_bits
from manylora.sound.tokens import SpeechForm, SpeechTokens

__all__ = ["SpeechRules"]


@dataclass(frozen=True, slots=True)
class _Masks:
    """What does not depend on what was said before; nobody writes into these.

    `first` may begin a text, `plain` go on, `text` is that without times and `times` without text.
    """

    first: Bits
    plain: Bits
    text: Bits
    times: Bits


@lru_cache(maxsize=8)
def _masks(tokens: SpeechTokens, vocab_size: int, *, has_timestamps: bool) -> _Masks:
    """The masks of all transcripts of a model, with times in them or without."""

    def clear(bits: Bits, token_ids: Sequence[int]) -> None:
        clear_bits(bits, [each for each in token_ids if 0 <= each < vocab_size])

    def clear_from(bits: Bits, begin: int, end: int) -> None:
        clear_range(bits, min(begin, vocab_size), min(end, vocab_size))

    plain = open_bits(vocab_size)
    clear(plain, tokens.suppressed)
    if has_timestamps:
        clear(plain, (tokens.no_timestamps,))
    first, text, times = plain.copy(), plain.copy(), plain.copy()
    clear(first, tokens.suppressed_first)
    if has_timestamps:
        clear_from(first, 0, tokens.first_timestamp)
        if tokens.max_first_timestamp is not None:
            clear_from(first, tokens.first_timestamp + tokens.max_first_timestamp + 1, vocab_size)
    clear_from(text, tokens.first_timestamp, vocab_size)
    clear_from(times, 0, tokens.end)
    for each in (first, plain, text, times):
        each.setflags(write=False)
    return _Masks(first, plain, text, times)


class SpeechRules:
    """The rules of one sequence. Implements `token_rules.Rules`."""

    __slots__ = ("_form", "_masks", "_vocab_size")

    def __init__(self, form: SpeechForm, vocab_size: int) -> None:
        self._form: Final = form
        self._vocab_size: Final = vocab_size
        self._masks: Final = _masks(form.tokens, vocab_size, has_timestamps=form.has_timestamps)

    def is_settled(self, num_output: int) -> bool:
        """Whether the next token, behind so many of the answer, is the likeliest that may come, not one by chance."""
        return num_output < len(self._form.first)

    def weighs_times(self, num_output: int) -> bool:
        """Whether a time is to come next where all times together are likelier than each token of text."""
        return self._form.has_timestamps and not self.is_settled(num_output)

    def allowed(self, tokens: Sequence[int], num_output: int, by_grammar: Bits | None = None) -> Bits | None:
        """What may come next; see `token_rules.Rules`."""
        bits = self._allowed(tokens[len(tokens) - num_output :])
        return bits if by_grammar is None else bits & by_grammar

    def _allowed(self, output: Sequence[int]) -> Bits:
        form = self._form
        if self.is_settled(len(output)):
            bits = open_bits(self._vocab_size, is_open=False)
            set_bits(bits, form.first[len(output)])
            return bits
        text = output[len(form.first) :]
        if not text:
            return self._masks.first
        return self._behind(text) if form.has_timestamps else self._masks.plain

    def _behind(self, text: Sequence[int]) -> Bits:
        """What may follow text with times in it."""
        first = self._form.tokens.first_timestamp
        is_behind_time = text[-1] >= first
        if is_behind_time and (len(text) < 2 or text[-2] >= first):
            return self._masks.text
        last = next((token for token in reversed(text) if token >= first), None)
        bits = (self._masks.times if is_behind_time else self._masks.plain).copy()
        if last is not None:
            clear_range(bits, first, min(last if is_behind_time else last + 1, self._vocab_size))
        return bits
