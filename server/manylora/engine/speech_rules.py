"""Which tokens may come next in a transcript, as Whisper's own decoding has it (Radford et al., 2022).

A transcript may begin with tokens that say what language is heard. Then comes text, or with timestamps a time, text and
a time again: times come in pairs but at the ends and never go back.
"""

from collections.abc import Sequence
from typing import Final

from manylora.engine.token_rules import Bits, clear_bits, open_bits, set_bits
from manylora.sound.tokens import SpeechForm

__all__ = ["SpeechRules"]


class SpeechRules:
    """The rules of one sequence. Implements `token_rules.Rules`."""

    __slots__ = ("_first", "_form", "_plain", "_vocab_size")

    def __init__(self, form: SpeechForm, vocab_size: int) -> None:
        tokens = form.tokens
        self._form: Final = form
        self._vocab_size: Final = vocab_size
        self._plain = open_bits(vocab_size)
        self._clear(self._plain, tokens.suppressed)
        if form.has_timestamps:
            self._clear(self._plain, (tokens.no_timestamps,))
        self._first = self._plain.copy()
        self._clear(self._first, tokens.suppressed_first)
        if form.has_timestamps:
            self._clear(self._first, range(tokens.first_timestamp))
            if tokens.max_first_timestamp is not None:
                self._clear(self._first, range(tokens.first_timestamp + tokens.max_first_timestamp + 1, vocab_size))

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
            return self._first
        return self._behind(text) if form.has_timestamps else self._plain

    def _behind(self, text: Sequence[int]) -> Bits:
        """What may follow text with times in it."""
        bits = self._plain.copy()
        first = self._form.tokens.first_timestamp
        is_behind_time = text[-1] >= first
        is_behind_pair = is_behind_time and (len(text) < 2 or text[-2] >= first)
        if is_behind_pair:
            self._clear(bits, range(first, self._vocab_size))
        elif is_behind_time:
            self._clear(bits, range(self._form.tokens.end))
        last = next((token for token in reversed(text) if token >= first), None)
        if last is not None:
            self._clear(bits, range(first, last if is_behind_time and not is_behind_pair else last + 1))
        return bits

    def _clear(self, bits: Bits, token_ids: Sequence[int]) -> None:
        clear_bits(bits, [each for each in token_ids if 0 <= each < self._vocab_size])
