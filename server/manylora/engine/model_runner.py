"""The host part of a step: what sequences need becomes plain arrays, and what comes back becomes theirs. No torch.

Random choice needs one uniform number per token, made from the request's seed, the choice's index and the
token's place by a counter-based generator. So a seed gives the same tokens whatever else is in the batch,
and after a preemption too. The generator is asked for many places of a sequence at once: setting it up takes
far longer than its numbers do.
"""

from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from manylora.engine.executor import Executor
from manylora.engine.interface import Head, Task, TokenLogprob
from manylora.engine.pieces import Pieces
from manylora.engine.sequence import Draws, Scheduled, Sequence
from manylora.engine.step_input import (
    Adjustment,
    Allowed,
    Draw,
    PrefixInput,
    Sampled,
    SamplingInput,
    Scored,
    ScoredRows,
    StateInput,
    StepInput,
)
from manylora.engine.token_rules import Bits, widened
from manylora.errors import InvalidRequest, ManyloraError
from manylora.identity import Mix
from manylora.kernels.rows import Parts, mix_number

DRAWS_AHEAD = 64  # places of a sequence whose random numbers are made together
_WORDS = 4  # numbers of 64 bits that the generator makes of one counter, of which the first is used
_NO_IDS = np.zeros(0, dtype=np.int64)
_NO_NUMBERS = np.zeros(0, dtype=np.float32)

Ahead = tuple[int, ...]  # tokens of a draft between a sequence's last one and a row's place


@dataclass(slots=True)
class Outcome:
    """What a step gave one sequence: its next tokens, where the step reached its end.

    The first `num_accepted` tokens are the draft's, which have run already; behind them comes at least one that has
    not. `logprobs` has an entry for each token, or none. `prompt_logprobs`, `captured` (logits [rows, vocab], in
    pieces) and `hidden` (hidden states [rows, hidden], in pieces) are of the step's own part of a prompt. `pooled` is
    the whole answer of an input of an encoder or for a head, with the `head` that gave it; `error`, why there is none.
    `is_finite`: False where what was computed holds NaN or infinity.
    """

    token_ids: SequenceOf[int] = ()
    num_accepted: int = 0
    logprobs: SequenceOf[TokenLogprob] = ()
    prompt_logprobs: SequenceOf[TokenLogprob] = ()
    captured: SequenceOf[np.ndarray] = ()
    hidden: SequenceOf[np.ndarray] = ()
    pooled: np.ndarray | None = None
    head: Head | None = None
    error: ManyloraError | None = None
    is_finite: bool = True

    def add(self, later: "Outcome") -> None:
        """Take over what the step's part with the sequence's later tokens gave."""
        self.token_ids, self.num_accepted, self.logprobs = later.token_ids, later.num_accepted, later.logprobs
        self.prompt_logprobs = (*self.prompt_logprobs, *later.prompt_logprobs)
        self.captured = (*self.captured, *later.captured)
        self.hidden = (*self.hidden, *later.hidden)
        self.pooled, self.head, self.error = later.pooled, later.head, later.error
        self.is_finite &= later.is_finite

    @classmethod
    def of_whole(cls, item: Scheduled, array: np.ndarray | None, head: Head | None) -> "Outcome":
        """What was asked of an input's states, once all of it has run; None of a head that is not there."""
        if array is None:
            return cls(error=_no_head(item.seq.mix))
        return cls(pooled=array, head=head, is_finite=bool(np.isfinite(array).all()))


class Runner(Protocol):
    """Runs plans, on the engine's thread. What it runs may be run again, and no sequence changes.

    `spare_block`: the block of the cache that no sequence has; None where there is no cache, so that an input runs
    whole or not at all. `vocab_size`: token ids are below it.
    """

    @property
    def spare_block(self) -> int | None: ...

    @property
    def vocab_size(self) -> int: ...

    def forward(self, scheduled: SequenceOf[Scheduled]) -> Any:
        """Run the model once; what `sample` is handed."""
        ...

    def sample(self, scheduled: SequenceOf[Scheduled], logits: Any) -> list[Outcome]:
        """What each item gets."""
        ...


class ModelRunner:
    """Runs plans of a decoder. Lives on the engine's thread. Implements `Runner`.

    What it runs may be run again, as a whole or in parts: the keys and values are written to the same places, and
    no sequence changes. `pieces`: those that layers run which keep a state of each sequence; None where none
    does.
    """

    def __init__(self, executor: Executor, *, pieces: Pieces | None = None) -> None:
        self._executor = executor
        self._block_size = executor.block_size
        self._pieces = pieces

    @property
    def spare_block(self) -> int:
        """The block of the cache that no sequence has."""
        return self._executor.spare_block

    @property
    def vocab_size(self) -> int:
        """Of the logits."""
        return self._executor.vocab_size

    def forward(self, scheduled: SequenceOf[Scheduled]) -> Any:
        """Logits [L, vocab] of the rows that are wanted, in the order of the plan; the executor's, as it keeps them."""
        return self._executor.forward(self._build(scheduled))

    def sample(self, scheduled: SequenceOf[Scheduled], logits: Any) -> list[Outcome]:
        """What each item gets: a sample for who reached its end, and the prompt's log-probabilities on the way."""
        rows: list[int] = []
        seqs: list[Sequence] = []
        ahead: list[Ahead] = []
        asking: list[tuple[int, Ahead]] = []  # an item's number, and its draft as far as its grammar follows it
        scored: list[Scored] = []
        at = 0
        for number, item in enumerate(scheduled):
            if item.is_scored:
                scored.append(_scored(item, at))
            at += item.num_logits
            if item.samples and _asks_model(item.seq):
                draft = _followed(item)
                asking.append((number, draft))
                for place in range(len(draft) + 1):
                    rows.append(at - 1 - len(item.draft) + place)
                    seqs.append(item.seq)
                    ahead.append(draft[:place])
        outcomes = [Outcome() for _ in scheduled]
        if any(item.num_hidden for item in scheduled):
            _take_hidden(scheduled, self._executor.hidden(), self._executor.scores(), outcomes)
        if not rows and not scored:
            return outcomes
        sampled = self._executor.sample(logits, self._sampling_input(seqs, ahead, rows, scored))
        found = iter(sampled.scored)
        at = 0
        if scored:
            for item, outcome in zip(scheduled, outcomes, strict=True):
                if item.is_scored:
                    _take_scored(item, next(found), outcome)
        for number, draft in asking:
            _take(sampled, at, draft, outcomes[number])
            at += len(draft) + 1
        return outcomes

    def _sampling_input(
        self, seqs: SequenceOf[Sequence], ahead: SequenceOf[Ahead], rows: SequenceOf[int], scored: list[Scored]
    ) -> SamplingInput:
        return sampling_input(seqs, ahead, rows, scored)

    def _build(self, planned: SequenceOf[Scheduled]) -> StepInput:
        size = self._block_size
        prefixes = tuple(self._prefix(item) for item in planned if item.num_virtual)
        scheduled = [item for item in planned if item.num_rows] if prefixes else planned
        if not scheduled:
            return StepInput.of(prefixes)
        counts = np.array([s.num_rows for s in scheduled])
        starts = np.concatenate(([0], counts.cumsum()))
        tables = np.zeros((len(scheduled), max(len(s.seq.block_table) for s in scheduled)), dtype=np.int32)
        tokens: list[int] = []
        logit_rows: list[int] = []
        hidden_rows: list[int] = []
        end = 0
        for i, item in enumerate(scheduled):
            tables[i, : len(item.seq.block_table)] = item.seq.block_table
            tokens += item.seq.tokens[item.first : item.start + item.num_tokens]
            tokens += item.draft
            end += item.num_rows
            logit_rows += range(end - item.num_logits, end)
            hidden_rows += range(end - item.num_hidden, end)
        first = np.array([s.seq.num_virtual + s.first for s in scheduled])
        owner = np.repeat(np.arange(len(scheduled)), counts)
        positions = first[owner] + np.arange(starts[-1]) - starts[owner]
        slots, mixes = slots_of(scheduled)
        return StepInput(
            heads=_heads(scheduled, slots) if hidden_rows else (),
            token_ids=np.array(tokens),
            positions=positions,
            kv_slots=tables[owner, positions // size].astype(np.int64) * size + positions % size,
            block_tables=tables,
            query_starts=starts.astype(np.int32),
            context_lens=(first + counts).astype(np.int32),
            slots=_row_slots(slots, scheduled, owner, positions),
            logit_rows=np.array(logit_rows, dtype=np.int64),
            hidden_rows=np.array(hidden_rows, dtype=np.int64),
            prefixes=prefixes,
            mixes=mixes,
            states=() if self._pieces is None else tuple(_state(item, self._pieces) for item in scheduled),
        )

    def _prefix(self, item: Scheduled) -> PrefixInput:
        """The step's part of a sequence's virtual tokens, which are there before its first one runs."""
        seq, size = item.seq, self._block_size
        begin = seq.num_virtual + item.start
        at = np.arange(begin + item.num_virtual)
        kv_slots = np.array(seq.block_table, dtype=np.int64)[at // size] * size + at % size
        return PrefixInput(seq.slots[0], begin, kv_slots)


def _state(item: Scheduled, pieces: Pieces) -> StateInput:
    seq, start = item.seq, item.start
    end = start + item.num_rows
    return StateInput(
        seq.state_slot,
        start,
        min(seq.num_computed, start),
        pieces.cut(seq, start, end),
        seq.begins_with if start == seq.num_computed else -1,
        tuple((at, room) for at, room in seq.snapshots.items() if room is not None and start < at <= end),
    )


def _row_slots(
    slots: np.ndarray, scheduled: SequenceOf[Scheduled], owner: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """Each row's slot, int32, of each item's: of tokens before those that invoke a sequence's adapter none."""
    found: np.ndarray = slots[owner]
    if any(s.seq.acts_from > s.first for s in scheduled):
        found[positions < np.array([s.seq.acts_from for s in scheduled])[owner]] = -1
    return found


def slots_of(scheduled: SequenceOf[Scheduled]) -> tuple[np.ndarray, tuple[Parts, ...]]:
    """Each item's slot or number of its mix, int32 [S], and the mixes."""
    numbers: dict[str, int] = {}
    mixes: list[Parts] = []
    slots = np.empty(len(scheduled), dtype=np.int32)
    for i, item in enumerate(scheduled):
        seq = item.seq
        if seq.mix.is_plain:
            slots[i] = seq.slots[0] if seq.slots else -1
            continue
        number = numbers.setdefault(seq.mix.key, len(mixes))
        if number == len(mixes):
            mixes.append(tuple((slot, weight) for slot, (_, weight) in zip(seq.slots, seq.mix.parts, strict=True)))
        slots[i] = mix_number(number)
    return slots, tuple(mixes)


# the prompt's own tokens


def _scored(item: Scheduled, first: int) -> Scored:
    """What is asked of the rows of a prompt that are among the logits from `first` on."""
    seq, num_rows = item.seq, item.num_logits
    following = seq.tokens[item.first + 1 : item.first + num_rows + 1] if seq.params.prompt_logprobs is not None else []
    checks_last = item.reaches_end and seq.task is Task.SCORE
    num_top, has_ranks = seq.params.prompt_logprobs or 0, seq.params.prompt_ranks
    return Scored(first, num_rows, following, num_top, has_ranks, seq.capture_logits, checks_last)


def _take_scored(item: Scheduled, rows: ScoredRows, outcome: Outcome) -> None:
    outcome.is_finite &= rows.is_finite
    if rows.captured is not None:
        outcome.captured = [rows.captured]
    elif item.seq.params.prompt_logprobs is not None:
        start = [TokenLogprob(item.seq.tokens[0], None)] if item.begins else []
        outcome.prompt_logprobs = [*start, *rows.entries]


def _heads(scheduled: SequenceOf[Scheduled], slots: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Which of the step's hidden rows a head reads: the row's place, and the adapter's slot."""
    at, found = 0, []
    for item, slot in zip(scheduled, slots.tolist(), strict=True):
        at += item.num_hidden
        if item.num_hidden and item.seq.params.reads_head:
            found.append((at - 1, slot))
    return tuple(found)


def _take_hidden(
    scheduled: SequenceOf[Scheduled],
    hidden: np.ndarray,
    scores: SequenceOf[tuple[np.ndarray | None, Head | None]],
    outcomes: list[Outcome],
) -> None:
    at, scored = 0, iter(scores)
    for number, item in enumerate(scheduled):
        if not item.num_hidden:
            continue
        if item.seq.params.reads_head:
            outcomes[number] = Outcome.of_whole(item, *next(scored))
        else:
            outcomes[number].hidden = [hidden[at : at + item.num_hidden]]
        at += item.num_hidden


def _no_head(mix: Mix) -> InvalidRequest:
    """What a caller is told who asks for the labels of what has none."""
    if not mix.is_plain:
        return InvalidRequest(f"{mix.label} is a mix, which has no labels of its own. Name one adapter.", param="model")
    named = f"The adapter {mix.label} has" if mix.parts else "The base model has"
    return InvalidRequest(f"{named} no labels. Name an adapter that was trained as a classifier.", param="model")


# the next tokens


def _asks_model(seq: Sequence) -> bool:
    """Not where its grammar says what comes, or has yet to say what may."""
    return seq.constraint is None or (seq.constraint.is_ready and not seq.constraint.is_decided)


def _followed(item: Scheduled) -> Ahead:
    """The draft of an item, as far as is known what may come behind each token."""
    constraint = item.seq.constraint
    return item.draft if constraint is None else item.draft[: len(constraint.ahead)]


def _take(sampled: Sampled, first: int, draft: Ahead, outcome: Outcome) -> None:
    """Of the rows from `first` on, one for the sequence's last token and one for each of its draft, those that count.

    A row behind a token that was not to come says nothing.
    """
    if not draft:  # as nearly always
        outcome.token_ids = (sampled.token_ids[first],)
        entry = sampled.logprobs[first]
        if entry is not None:
            outcome.logprobs = (entry,)
        outcome.is_finite &= sampled.is_finite[first]
        return
    num_accepted = 0
    while num_accepted < len(draft) and sampled.token_ids[first + num_accepted] == draft[num_accepted]:
        num_accepted += 1
    taken = slice(first, first + num_accepted + 1)
    outcome.token_ids, outcome.num_accepted = sampled.token_ids[taken], num_accepted
    outcome.logprobs = [entry for entry in sampled.logprobs[taken] if entry is not None]
    outcome.is_finite &= all(sampled.is_finite[taken])


def sampling_input(
    seqs: SequenceOf[Sequence], ahead: SequenceOf[Ahead], rows: SequenceOf[int], scored: list[Scored]
) -> SamplingInput:
    """How a token is to be chosen of each of `rows`: row i is of `seqs[i]`, behind the tokens `ahead[i]` of a draft."""
    return SamplingInput(
        rows=np.array(rows, dtype=np.int64),
        top=[s.params.logprobs for s in seqs],
        adjustments=[_adjustment(i, s, ahead[i]) for i, s in enumerate(seqs) if s.has_penalties or s.params.logit_bias],
        allowed=_allowed(seqs, ahead),
        draw=_draw(seqs, ahead),
        scored=scored,
    )


def _allowed(seqs: SequenceOf[Sequence], ahead: SequenceOf[Ahead]) -> Allowed | None:
    held = [
        (i, bits)
        for i, seq in enumerate(seqs)
        if (seq.constraint is not None or seq.rules is not None) and (bits := allowed_bits(seq, ahead[i])) is not None
    ]
    if not held:
        return None
    most = max(len(bits) for _, bits in held)  # of an adapter with more tokens than the base there are more
    return Allowed(
        np.array([row for row, _ in held], dtype=np.int64), np.stack([widened(bits, most) for _, bits in held])
    )


def allowed_bits(seq: Sequence, ahead: Ahead = ()) -> Bits | None:
    """What may come next in a sequence by its grammar and its request's rules; None where anything may."""
    by_grammar = None
    if seq.constraint is not None:
        by_grammar = seq.constraint.ahead[len(ahead) - 1] if ahead else seq.constraint.allowed
    if seq.rules is None:
        return by_grammar
    tokens = [*seq.tokens, *ahead] if ahead else seq.tokens
    return seq.rules.allowed(tokens, seq.num_output_tokens + len(ahead), by_grammar)


def _adjustment(row: int, seq: Sequence, ahead: Ahead) -> Adjustment:
    p = seq.params
    seen = sorted({*seq.tokens, *ahead}) if p.repetition_penalty != 1.0 else ()
    output = seq.output_counts + Counter(ahead) if ahead else seq.output_counts
    if seq.bias is None:
        seq.bias = (
            np.array([i for i, _ in p.logit_bias], dtype=np.int64),
            np.array([b for _, b in p.logit_bias], dtype=np.float32),
        )
    counts_matter = output and (p.presence_penalty or p.frequency_penalty)
    return Adjustment(
        row=row,
        seen=np.array(seen, dtype=np.int64),
        repetition_penalty=p.repetition_penalty,
        output=np.array(list(output), dtype=np.int64) if counts_matter else _NO_IDS,
        counts=np.array(list(output.values()), dtype=np.float32) if counts_matter else _NO_NUMBERS,
        presence_penalty=p.presence_penalty,
        frequency_penalty=p.frequency_penalty,
        biased=seq.bias[0],
        bias=seq.bias[1],
    )


def _draw(seqs: SequenceOf[Sequence], ahead: SequenceOf[Ahead]) -> Draw | None:
    random_rows = [i for i, s in enumerate(seqs) if s.params.temperature > 0]
    if not random_rows:
        return None
    params = [seqs[i].params for i in random_rows]
    return Draw(
        rows=np.array(random_rows, dtype=np.int64),
        temperature=np.array([p.temperature for p in params], dtype=np.float32),
        top_k=np.array([p.top_k for p in params], dtype=np.int64),
        top_p=np.array([p.top_p for p in params], dtype=np.float32),
        min_p=np.array([p.min_p for p in params], dtype=np.float32),
        typical_p=np.array([p.typical_p for p in params], dtype=np.float32),
        uniform=np.array([uniform_number(seqs[i], len(ahead[i])) for i in random_rows], dtype=np.float64),
    )


def uniform_number(seq: Sequence, num_ahead: int = 0) -> float:
    """The number in [0, 1) for the sequence's token `num_ahead` places behind its next: of seed, index and place only.

    The numbers are kept with the sequence and made `DRAWS_AHEAD` at a time, up to a place that depends on the seed,
    so that sequences which begin together do not all need new ones in the same step.
    """
    first = seq.num_output_tokens
    place = first + num_ahead
    draws = seq.draws
    if draws is None or not 0 <= place - draws.first < len(draws.numbers):
        count = num_ahead + DRAWS_AHEAD - (place + seq.seed) % DRAWS_AHEAD
        draws = seq.draws = Draws(first, uniform_numbers(seq.seed, seq.index, first, count))
    return draws.numbers[place - draws.first]


def uniform_numbers(seed: int, index: int, first: int, count: int) -> list[float]:
    """The numbers in [0, 1) of `count` places from `first` on (Philox 4x64, Salmon et al., SC 2011)."""
    key = np.array([seed % 2**64, index], dtype=np.uint64)
    words = np.random.Philox(key=key, counter=first).random_raw(_WORDS * count)[::_WORDS]
    numbers: list[float] = ((words >> np.uint64(11)) * 2.0**-53).tolist()
    return numbers
