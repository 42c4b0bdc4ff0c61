"""One step on the device: build the ragged batch, run the model once, sample."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch

from manylora.engine.interface import TokenLogprob
from manylora.engine.sampler import Sampled, sample, token_logprobs
from manylora.engine.scheduler import Scheduled
from manylora.engine.sequence import Sequence
from manylora.kernels.batch import Batch
from manylora.kernels.interface import LoraKernel, LoraPlan
from manylora.kernels.rows import group_rows
from manylora.lora.memory.device_memory import DeviceMemory
from manylora.models.kv_cache import KVCache
from manylora.models.wrapping import WrappedModel


@dataclass(slots=True)
class Outcome:
    """What a step gave one sequence: its next tokens, where the step reached its end.

    The first `num_accepted` tokens are the draft's, which have run already; behind them comes at least one that has
    not. `logprobs` has an entry for each token, or none. `prompt_logprobs` and `captured` (logits [rows, vocab], in
    pieces) are of the step's own part of a prompt. `is_finite`: False where its logits hold NaN or infinity.
    """

    token_ids: SequenceOf[int] = ()
    num_accepted: int = 0
    logprobs: SequenceOf[TokenLogprob] = ()
    prompt_logprobs: SequenceOf[TokenLogprob] = ()
    captured: SequenceOf[torch.Tensor] = ()
    is_finite: bool = True

    def add(self, later: "Outcome") -> None:
        """Take over what the step's part with the sequence's later tokens gave."""
        self.token_ids, self.num_accepted, self.logprobs = later.token_ids, later.num_accepted, later.logprobs
        self.prompt_logprobs = (*self.prompt_logprobs, *later.prompt_logprobs)
        self.captured = (*self.captured, *later.captured)
        self.is_finite &= later.is_finite


class ModelRunner:
    """Runs plans. Lives on the engine's thread.

    What it runs may be run again, as a whole or in parts: the keys and values are written to the same places, and
    no sequence changes.
    """

    def __init__(self, wrapped: WrappedModel, cache: KVCache, memory: DeviceMemory, kernel: LoraKernel) -> None:
        self._wrapped = wrapped
        self._vocab_size = wrapped.vocab_size
        self._cache = cache
        self._memory = memory
        self._kernel = kernel
        self._device = memory.device

    @property
    def spare_block(self) -> int:
        """The block of the cache that no sequence has."""
        return self._cache.spare_block

    @torch.inference_mode()
    def forward(self, scheduled: SequenceOf[Scheduled]) -> torch.Tensor:
        """Logits [L, vocab] of the rows that are wanted, in the order of the plan."""
        batch = self._build(scheduled)
        context = self._wrapped.context
        context.batch = batch
        try:
            output = self._wrapped.model(
                input_ids=batch.token_ids[None],
                position_ids=batch.positions[None],
                use_cache=False,
                logits_to_keep=batch.logit_rows,
            )
        finally:
            context.batch = None
        logits: torch.Tensor = output.logits[0]
        return logits[:, : self._vocab_size] if logits.shape[1] > self._vocab_size else logits

    @torch.inference_mode()
    def sample(self, scheduled: SequenceOf[Scheduled], logits: torch.Tensor) -> list[Outcome]:
        """What each item gets: a sample for who reached its end, and the prompt's log-probabilities on the way."""
        outcomes = [Outcome() for _ in scheduled]
        rows: list[int] = []
        seqs: list[Sequence] = []
        ahead: list[tuple[int, ...]] = []
        at = 0
        for item, outcome in zip(scheduled, outcomes, strict=True):
            count = len(_logit_rows(item, 0))
            if item.seq.scores_prompt:
                self._read_prompt(item, logits[at : at + count], outcome)
            at += count
            if item.samples:
                for place in range(len(item.draft) + 1):
                    rows.append(at - 1 - len(item.draft) + place)
                    seqs.append(item.seq)
                    ahead.append(item.draft[:place])
        if seqs:
            wanted = logits if len(rows) == logits.shape[0] else logits[rows]
            sampled = sample(wanted, seqs, ahead)
            at = 0
            for item, outcome in zip(scheduled, outcomes, strict=True):
                if item.samples:
                    _take(sampled, at, item.draft, outcome)
                    at += len(item.draft) + 1
        return outcomes

    def _read_prompt(self, item: Scheduled, logits: torch.Tensor, outcome: Outcome) -> None:
        seq = item.seq
        if seq.capture_logits:
            outcome.captured = [logits.float().clone()]
            return
        following = seq.tokens[item.start + 1 : item.start + item.num_tokens + 1]
        entries = token_logprobs(
            logits[: len(following)], following, [seq.params.prompt_logprobs or 0] * len(following)
        )
        if any(entry.logprob != entry.logprob for entry in entries):  # NaN
            outcome.is_finite = False
        outcome.prompt_logprobs = [TokenLogprob(seq.tokens[0], None), *entries] if not item.start else entries

    def _build(self, scheduled: SequenceOf[Scheduled]) -> Batch:
        size = self._cache.block_size
        counts = np.array([s.num_rows for s in scheduled])
        starts = np.concatenate(([0], counts.cumsum()))
        tables = np.zeros((len(scheduled), max(len(s.seq.block_table) for s in scheduled)), dtype=np.int32)
        tokens: list[int] = []
        logit_rows: list[int] = []
        for i, item in enumerate(scheduled):
            tables[i, : len(item.seq.block_table)] = item.seq.block_table
            tokens += item.seq.tokens[item.start : item.start + item.num_tokens]
            tokens += item.draft
            logit_rows += _logit_rows(item, int(starts[i]))
        first = np.array([s.start for s in scheduled])
        owner = np.repeat(np.arange(len(scheduled)), counts)
        positions = first[owner] + np.arange(starts[-1]) - starts[owner]
        kv_slots = tables[owner, positions // size].astype(np.int64) * size + positions % size
        slots = np.array([s.seq.slot for s in scheduled], dtype=np.int32)[owner]
        lens = first + counts
        return Batch(
            token_ids=self._tensor(np.array(tokens)),
            positions=self._tensor(positions),
            kv_slots=self._tensor(kv_slots),
            block_tables=self._tensor(tables),
            query_starts=self._tensor(starts.astype(np.int32)),
            context_lens=self._tensor(lens.astype(np.int32)),
            num_decode=int((counts == 1).sum()),
            starts=tuple(starts.tolist()),
            lens=tuple(lens.tolist()),
            logit_rows=self._tensor(np.array(logit_rows, dtype=np.int64)),
            lora=self._plan(slots),
            logit_lora=self._plan(slots[logit_rows]),
        )

    def _plan(self, row_slots: np.ndarray) -> LoraPlan | None:
        rows = group_rows(row_slots, self._memory.ranks, self._device)
        return self._kernel.plan(rows, self._memory) if rows is not None else None

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)


def _logit_rows(item: Scheduled, first_row: int) -> list[int]:
    """The rows of a sequence's chunk whose logits are wanted: all, the last and its draft's, or none."""
    if item.seq.scores_prompt:
        return list(range(first_row, first_row + item.num_tokens))
    return list(range(first_row + item.num_tokens - 1, first_row + item.num_rows)) if item.samples else []


def _take(sampled: Sampled, first: int, draft: tuple[int, ...], outcome: Outcome) -> None:
    """Of the rows from `first` on, one for the sequence's last token and one for each of its draft, those that count.

    A row behind a token that was not to come says nothing.
    """
    num_accepted = 0
    while num_accepted < len(draft) and sampled.token_ids[first + num_accepted] == draft[num_accepted]:
        num_accepted += 1
    taken = slice(first, first + num_accepted + 1)
    outcome.token_ids, outcome.num_accepted = sampled.token_ids[taken], num_accepted
    outcome.logprobs = [entry for entry in sampled.logprobs[taken] if entry is not None]
    outcome.is_finite &= all(sampled.is_finite[taken])
