"""One step on the device: build the ragged batch, run the model once, sample."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np
import torch

from manylora.engine.interface import TokenLogprob
from manylora.engine.sampler import sample, token_logprobs
from manylora.engine.scheduler import Scheduled
from manylora.engine.sequence import Sequence
from manylora.kernels.batch import Batch
from manylora.kernels.interface import LoraKernel, LoraPlan
from manylora.kernels.rows import group_rows
from manylora.lora.memory.device_memory import DeviceMemory
from manylora.models.kv_cache import KVCache
from manylora.models.wrapping import WrappedModel


@dataclass(slots=True)
class StepResult:
    """What a step gave, by id() of the sequence: its next token, where the step reached its end.

    `prompt_logprobs` and `captured` (logits [rows, vocab], in pieces) are of the step's own part of a prompt.
    `not_finite` are the sequences whose logits hold NaN or infinity.
    """

    token_ids: dict[int, int] = field(default_factory=dict)
    logprobs: dict[int, TokenLogprob | None] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    captured: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    not_finite: set[int] = field(default_factory=set)

    def add(self, later: "StepResult") -> None:
        """Take over what another part of the step gave, of the same sequences' later tokens or of others."""
        self.token_ids |= later.token_ids
        self.logprobs |= later.logprobs
        self.not_finite |= later.not_finite
        for key, entries in later.prompt_logprobs.items():
            self.prompt_logprobs.setdefault(key, []).extend(entries)
        for key, pieces in later.captured.items():
            self.captured.setdefault(key, []).extend(pieces)


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
    def sample(self, scheduled: SequenceOf[Scheduled], logits: torch.Tensor) -> StepResult:
        """Sample every sequence that reached its end, and read the prompt's log-probabilities on the way."""
        result = StepResult()
        rows: list[int] = []
        seqs: list[Sequence] = []
        at = 0
        for item in scheduled:
            count = len(_logit_rows(item, 0))
            if item.seq.scores_prompt:
                self._read_prompt(item, logits[at : at + count], result)
            at += count
            if item.samples:
                rows.append(at - 1)
                seqs.append(item.seq)
        if seqs:
            wanted = logits if len(rows) == logits.shape[0] else logits[rows]
            sampled = sample(wanted, seqs)
            for i, seq in enumerate(seqs):
                result.token_ids[id(seq)] = sampled.token_ids[i]
                result.logprobs[id(seq)] = sampled.logprobs[i]
            if not all(sampled.is_finite):
                result.not_finite.update(id(s) for s, ok in zip(seqs, sampled.is_finite, strict=True) if not ok)
        return result

    def _read_prompt(self, item: Scheduled, logits: torch.Tensor, result: StepResult) -> None:
        seq = item.seq
        if seq.capture_logits:
            result.captured[id(seq)] = [logits.float().clone()]
            return
        following = seq.tokens[item.start + 1 : item.start + item.num_tokens + 1]
        entries = token_logprobs(
            logits[: len(following)], following, [seq.params.prompt_logprobs or 0] * len(following)
        )
        if any(entry.logprob != entry.logprob for entry in entries):  # NaN
            result.not_finite.add(id(seq))
        result.prompt_logprobs[id(seq)] = [TokenLogprob(seq.tokens[0], None), *entries] if not item.start else entries

    def _build(self, scheduled: SequenceOf[Scheduled]) -> Batch:
        size = self._cache.block_size
        counts = np.array([s.num_tokens for s in scheduled])
        starts = np.concatenate(([0], counts.cumsum()))
        tables = np.zeros((len(scheduled), max(len(s.seq.block_table) for s in scheduled)), dtype=np.int32)
        tokens: list[int] = []
        logit_rows: list[int] = []
        for i, item in enumerate(scheduled):
            tables[i, : len(item.seq.block_table)] = item.seq.block_table
            tokens += item.seq.tokens[item.start : item.start + item.num_tokens]
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
    """The rows of a sequence's chunk whose logits are wanted: all, the last, or none."""
    if item.seq.scores_prompt:
        return list(range(first_row, first_row + item.num_tokens))
    return [first_row + item.num_tokens - 1] if item.samples else []
