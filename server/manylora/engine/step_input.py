"""What a step computes, in numbers alone: numpy arrays and plain values that could be sent to another process.

`model_runner` makes them of sequences; an executor (`executor`) runs them and knows no sequence.
"""

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from manylora.engine.interface import Pooling, TokenLogprob
from manylora.kernels.rows import Parts


@dataclass(frozen=True, slots=True)
class PrefixInput:
    """Virtual tokens that a sequence's tokens look back at, from number `begin` on, of the adapter in `slot`.

    `kv_slots` int64, as of a step's tokens: where they go, behind where those before them are.
    """

    slot: int
    begin: int
    kv_slots: np.ndarray


@dataclass(frozen=True, slots=True)
class StateInput:
    """One sequence's part of a step for layers that keep a state of it, in `slot`; -1: a sequence that is nobody's.

    It begins at position `start`, with the copy in room `begins_with` unless that is -1, and is run in pieces of
    `sizes` tokens. Below position `committed` no step of the sequence will begin any more. `snapshots`: positions, and
    the rooms that a copy of what is kept there goes to.
    """

    slot: int
    start: int
    committed: int
    sizes: tuple[int, ...]
    begins_with: int = -1
    snapshots: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class SoundInput:
    """A spectrogram float32 [mels, frames] that a sequence begins to write down.

    What its encoder makes of it, with the adapter in `slot` (as of a step's tokens), is kept in `state_slot`.
    """

    sound: np.ndarray
    slot: int
    state_slot: int


@dataclass(frozen=True, slots=True)
class StepInput:
    """T tokens of S sequences, one sequence after the other, without padding; those with one token first.

    `token_ids`, `positions`, `kv_slots` int64 [T]; `kv_slots` is block * block_size + offset, where each token's key
    and value go. `block_tables` int32 [S, most blocks], zero behind a sequence's own. `query_starts` int32 [S + 1]:
    each sequence's run of tokens. `context_lens` int32 [S]: keys to look at, this step's included. `slots` int32 [T]:
    each token's adapter slot, -1 for none, `kernels.rows.mix_number(i)` for `mixes[i]`, slots with a weight each.
    `logit_rows` int64 [L]: the tokens whose logits are wanted; `hidden_rows`
    int64 [P]: those whose hidden states are, as the head of the model would get them. `prefixes`: virtual
    tokens that have to be in the cache before the step. `states`: one for each sequence where layers keep a state of
    it, else none. `heads`: of hidden rows that are an adapter's head's to read, the place among `hidden_rows` and the
    slot. Of a model of speech, `sounds` are heard before the step, and `heard` [S] has the slot of what
    each sequence looks at; -1: a sequence that is nobody's.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    kv_slots: np.ndarray
    block_tables: np.ndarray
    query_starts: np.ndarray
    context_lens: np.ndarray
    slots: np.ndarray
    logit_rows: np.ndarray
    hidden_rows: np.ndarray
    mixes: tuple[Parts, ...] = ()
    prefixes: tuple[PrefixInput, ...] = ()
    states: tuple[StateInput, ...] = ()
    sounds: tuple[SoundInput, ...] = ()
    heard: tuple[int, ...] = ()
    heads: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, prefixes: tuple[PrefixInput, ...]) -> Self:
        """A step in which nothing but virtual tokens is brought into the cache."""
        none = np.empty(0, dtype=np.int64)
        short = none.astype(np.int32)
        starts = np.zeros(1, dtype=np.int32)
        return cls(none, none, none, short.reshape(0, 0), starts, short, short, none, none, prefixes=prefixes)


@dataclass(frozen=True, slots=True)
class EncoderInput:
    """Whole inputs for a model that looks in both directions, one after the other, without padding.

    `token_ids` int64 [T]; of each input its number of tokens (`lens`), its adapter's slot (`slots` int32, as
    `StepInput` has them) and what becomes of its states (`ways`): one vector, or the scores of its adapter's head.
    `types` int64 [T]: 1 for a token of the second text of a pair, else 0. `pictures`: float32 [channels, height, width]
    of each, in place of tokens, where the model sees images.
    """

    token_ids: np.ndarray
    lens: tuple[int, ...]
    slots: np.ndarray
    ways: tuple[Pooling | Literal["head"], ...]
    types: np.ndarray
    mixes: tuple[Parts, ...] = ()
    pictures: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True, slots=True)
class Adjustment:
    """What changes the logits of row `row` before a token is drawn of it.

    `seen` int64: tokens of prompt and output, each once, for `repetition_penalty`. `output` int64 and `counts`
    float32: tokens of the output and how often, for the other two penalties. `biased` int64 and `bias` float32.
    """

    row: int
    seen: np.ndarray
    repetition_penalty: float
    output: np.ndarray
    counts: np.ndarray
    presence_penalty: float
    frequency_penalty: float
    biased: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True, slots=True)
class Allowed:
    """Rows whose token is to be one of some: their numbers `rows` int64 [N] among those that are sampled, and for each
    its `bits` uint32 [N, words], token i's the bit i % 32 of word i // 32. The words cover the vocabulary.
    """

    rows: np.ndarray
    bits: np.ndarray


@dataclass(frozen=True, slots=True)
class Weighed:
    """Rows in which tokens from `first` on weigh as one: where together they are likelier than each before, none of
    those may come. `rows` int64 [N] are their numbers among those that are sampled.
    """

    rows: np.ndarray
    first: int


@dataclass(frozen=True, slots=True)
class Draw:
    """Rows that are drawn by chance: their numbers `rows` int64 [N] among those that are sampled, and for each its
    `temperature`, `top_p`, `min_p`, `typical_p` float32, `top_k` int64 (0: all) and `uniform` float64, in [0, 1).
    """

    rows: np.ndarray
    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    typical_p: np.ndarray
    uniform: np.ndarray


@dataclass(frozen=True, slots=True)
class Scored:
    """Rows of one prompt whose logits are wanted for themselves: `num_rows` from `first` on.

    `following`: the tokens that the first of these rows are to be asked for, each with its `num_top` likeliest.
    `has_ranks`: with the rank of each. `captures`: the logits are wanted whole instead. `checks_last`: nothing is
    sampled of the last row, so whether it is finite has to be asked.
    """

    first: int
    num_rows: int
    following: list[int]
    num_top: int
    has_ranks: bool
    captures: bool
    checks_last: bool


@dataclass(frozen=True, slots=True)
class SamplingInput:
    """What is wanted of a step's logits [L, vocab]: a token of each of `rows` int64 [R], and `scored` rows.

    Of the R rows, `top` [R] is how many likeliest tokens' log-probabilities are reported beside the chosen one's (0:
    the chosen one's alone), None where none is.
    """

    rows: np.ndarray
    top: list[int | None]
    adjustments: list[Adjustment]
    allowed: Allowed | None
    draw: Draw | None
    scored: list[Scored]
    weighed: Weighed | None = None


@dataclass(slots=True)
class ScoredRows:
    """What was asked of some rows of a prompt. `captured`: their logits, float32 [rows, vocab]."""

    entries: list[TokenLogprob]
    captured: np.ndarray | None
    is_finite: bool


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token per row, and its log-probabilities where they are wanted; and what was `scored`, in that order.

    `is_finite` is False for a row whose logits hold NaN or infinity, so that its token means nothing. A logit of
    -inf is a token that the model rules out; only a row of nothing else is not finite.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]
    is_finite: list[bool]
    scored: list[ScoredRows]
