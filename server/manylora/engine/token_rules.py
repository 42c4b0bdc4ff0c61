"""Which tokens a request rules out for its answer, besides what a grammar says of them.

`allowed_token_ids` leaves some, `bad_words` forbids the token that would complete one of them, and `min_tokens` those
that would end the answer. The last gives way where nothing else may come; where the others leave nothing, the request
cannot go on.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from manylora.engine.interface import SamplingParams

__all__ = ["Bits", "Rules", "TokenRules", "clear_bits", "clear_range", "open_bits", "set_bits"]

Bits = npt.NDArray[np.uint32]
"""A bit for each token of the vocabulary, token i's the bit i % 32 of word i // 32."""

_ALL_BITS: Final = 0xFFFFFFFF
_ALL: Final = np.uint32(_ALL_BITS)


class Rules(Protocol):
    """What may come next in one sequence. They remember nothing, so a step may ask them again."""

    def allowed(self, tokens: Sequence[int], num_output: int, by_grammar: Bits | None = None) -> Bits | None:
        """What may come after `tokens`, the last `num_output` of which are the answer's, of what the grammar allows.

        None where nothing is ruled out; no bit is set where nothing may come.
        """
        ...


class TokenRules:
    """The rules of one sequence. They hold nothing but what was asked, so a step may ask them again."""

    __slots__ = ("_by_prefix", "_ends", "_has_ruled_out", "_lengths", "_min_tokens", "_open")

    def __init__(self, params: SamplingParams, eos_ids: Iterable[int], vocab_size: int) -> None:
        self._open = open_bits(vocab_size, is_open=not params.allowed_token_ids)
        set_bits(self._open, params.allowed_token_ids)
        alone = [word[0] for word in params.bad_words if len(word) == 1]
        clear_bits(self._open, alone)
        self._has_ruled_out = bool(params.allowed_token_ids or alone)
        by_prefix = defaultdict[tuple[int, ...], list[int]](list)
        for *prefix, last in params.bad_words:
            by_prefix[tuple(prefix)].append(last)
        by_prefix.pop((), None)
        self._by_prefix = dict(by_prefix)
        self._lengths = tuple({len(prefix) for prefix in by_prefix})
        self._min_tokens = params.min_tokens
        self._ends = (*params.stop_token_ids, *(() if params.ignore_eos else eos_ids))

    @classmethod
    def of(cls, params: SamplingParams, eos_ids: Iterable[int], vocab_size: int) -> "TokenRules | None":
        """The rules of a request; None where it has none."""
        if not (params.allowed_token_ids or params.bad_words or params.min_tokens):
            return None
        return cls(params, eos_ids, vocab_size)

    def allowed(self, tokens: Sequence[int], num_output: int, by_grammar: Bits | None = None) -> Bits | None:
        """What may come after `tokens`, the last `num_output` of which are the answer's, of what the grammar allows.

        None where nothing is ruled out; no bit is set where nothing may come.
        """
        is_early = num_output < self._min_tokens
        if not (is_early or self._lengths or self._has_ruled_out):
            return by_grammar
        size = len(self._open)  # of an adapter's own vocabulary, which may be another than the grammar's
        bits = self._open.copy() if by_grammar is None else self._open & widened(by_grammar, size)[:size]
        for length in self._lengths:
            if length <= num_output and (last := self._by_prefix.get(tuple(tokens[-length:]))):
                clear_bits(bits, last)
        if is_early:
            going_on = bits.copy()
            clear_bits(going_on, self._ends)
            return going_on if going_on.any() else bits
        return bits


def open_bits(vocab_size: int, *, is_open: bool = True) -> Bits:
    """Bits for a vocabulary, all of whose tokens are set, or none."""
    num_words = -(-vocab_size // 32)
    bits: Bits = np.full(num_words, _ALL) if is_open else np.zeros(num_words, np.uint32)
    clear_range(bits, vocab_size, 32 * num_words)
    return bits


def widened(bits: Bits, num_words: int) -> Bits:
    """The bits with more words, in which none is set."""
    missing = num_words - len(bits)
    return bits if missing <= 0 else np.concatenate([bits, np.zeros(missing, np.uint32)])


def set_bits(bits: Bits, token_ids: Iterable[int]) -> None:
    """Set these tokens' bits, in place."""
    ids = np.fromiter(token_ids, np.int64)
    np.bitwise_or.at(bits, ids // 32, _bit_of(ids))


def clear_bits(bits: Bits, token_ids: Iterable[int]) -> None:
    """Clear these tokens' bits, in place."""
    ids = np.fromiter(token_ids, np.int64)
    if ids.size:
        np.bitwise_and.at(bits, ids // 32, ~_bit_of(ids))


def clear_range(bits: Bits, begin: int, end: int) -> None:
    """Clear the bits of the tokens from `begin` up to `end`, in place, word by word."""
    if begin >= end:
        return
    first, last = begin // 32, (end - 1) // 32
    below, above = (1 << begin % 32) - 1, (_ALL_BITS << ((end - 1) % 32 + 1)) & _ALL_BITS
    if first == last:
        bits[first] &= np.uint32(below | above)
        return
    bits[first] &= np.uint32(below)
    bits[first + 1 : last] = 0
    bits[last] &= np.uint32(above)


def _bit_of(ids: npt.NDArray[np.int64]) -> Bits:
    return np.left_shift(np.uint32(1), (ids % 32).astype(np.uint32))
