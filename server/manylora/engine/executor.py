"""The device part of a step: the model runs once over what the host part laid out, and its logits become tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import nn

from manylora.engine.heads import Answer, HeadReader
from manylora.engine.interface import Head
from manylora.engine.own_logits import OwnLogits, sample_by_width
from manylora.engine.sampler import sample
from manylora.engine.step_input import PrefixInput, Sampled, SamplingInput, StepInput
from manylora.kernels.batch import Batch, Piece
from manylora.kernels.interface import LoraKernel, LoraPlan, plan_of
from manylora.kernels.kv_entries import as_entries, read_entries, width_of
from manylora.kernels.rows import Parts
from manylora.lora.memory.device_memory import DeviceMemory, HeldPrefix
from manylora.models.kv_cache import KVCache
from manylora.models.states import cut
from manylora.models.wrapping import WrappedModel

_ROWS_AT_ONCE: Final = 64  # of virtual tokens


class Executor(Protocol):
    """Runs steps, on one device or several, in this process or another. Called on the engine's thread.

    The same step may be run again, as a whole or in parts: keys and values go to the same places. `block_size` is the
    cache's; `spare_block` is a block of it that no sequence has. `vocab_size` is the logits'.
    """

    @property
    def block_size(self) -> int: ...

    @property
    def spare_block(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def forward(self, step: StepInput) -> Any:
        """Run the model once. Returns the logits [L, vocab] of the rows that are wanted, or what stands for them."""
        ...

    def sample(self, logits: Any, wanted: SamplingInput) -> Sampled:
        """Tokens and log-probabilities of what `forward` has returned."""
        ...

    def hidden(self) -> np.ndarray:
        """The hidden states float32 [P, hidden] of the rows for which the last `forward` was asked for them."""
        ...

    def scores(self) -> list[tuple[np.ndarray | None, Head | None]]:
        """Of each of the last step's `heads` the scores float32 [labels], and the head; None and None without one."""
        ...


class LocalExecutor:
    """An `Executor` in this process, on one device."""

    def __init__(
        self,
        wrapped: WrappedModel,
        cache: KVCache,
        memory: DeviceMemory,
        kernel: LoraKernel,
        heads: HeadReader | None = None,
    ) -> None:
        self._wrapped = wrapped
        self._vocab_size = wrapped.vocab_size
        self._num_rows = int(wrapped.model.get_input_embeddings().weight.shape[0])
        self._cache = cache
        self._memory = memory
        self._kernel = kernel
        self._heads = heads or HeadReader(memory, {}, {})
        self._device = memory.device
        self._hidden: torch.Tensor | None = None  # [T, hidden], of a step that was asked for some
        self._scored: list[Answer] = []

    @property
    def block_size(self) -> int:
        return self._cache.block_size

    @property
    def spare_block(self) -> int:
        return self._cache.spare_block

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @torch.inference_mode()
    def forward(self, step: StepInput) -> torch.Tensor | OwnLogits:
        """Logits [L, vocab] of the rows that are wanted, and those that adapters with tokens of their own add."""
        for prefix in step.prefixes:
            self._place(prefix)
        if not step.token_ids.size:
            return torch.empty(0, self._vocab_size)
        batch = self._batch(step)
        self._hidden, self._scored = None, []
        context = self._wrapped.context
        context.batch = batch
        self._memory.named = batch.lora.rows.all_slots if batch.lora is not None else ()
        watch = self._wrapped.model.base_model.register_forward_hook(self._keep) if step.hidden_rows.size else None
        try:
            output = self._wrapped.model(
                input_ids=batch.token_ids[None],
                position_ids=self._wrapped.position_ids(batch),
                use_cache=False,
                logits_to_keep=batch.logit_rows,
            )
        finally:
            context.batch = None
            self._memory.named = ()
            for piece in batch.pieces:
                piece.states.settle()
            if watch is not None:
                watch.remove()
        if self._hidden is not None:
            self._hidden = self._hidden[self._tensor(step.hidden_rows)]
            self._scored = [self._score(slot, self._hidden[row : row + 1]) for row, slot in step.heads]
        logits: torch.Tensor = output.logits[0]
        logits = logits[:, : self._vocab_size] if logits.shape[1] > self._vocab_size else logits
        sizes = self._memory.vocabularies
        if not sizes or batch.logit_lora is None or sizes.keys().isdisjoint(batch.logit_lora.rows.slots):
            return logits
        widths = np.array([sizes.get(slot, self._vocab_size) for slot in step.slots[step.logit_rows].tolist()])
        return OwnLogits(logits, widths, batch.logit_lora.own_logits)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor | OwnLogits, wanted: SamplingInput) -> Sampled:
        return sample(logits, wanted) if isinstance(logits, torch.Tensor) else sample_by_width(logits, wanted)

    def _place(self, prefix: PrefixInput) -> None:
        """Bring virtual tokens into the cache: what was kept of them, or what the model makes of them at first."""
        held = self._memory.prefix(prefix.slot)
        begin, end, size = prefix.begin, len(prefix.kv_slots), self._cache.block_size
        copied = min(max(begin, held.num_ready), end)  # up to there they need not run
        slots = self._tensor(prefix.kv_slots)
        blocks, offsets = slots // size, slots % size
        for room, kept in self._kept(held) if begin < copied else ():
            room[blocks[begin:copied], :, offsets[begin:copied]] = as_entries(kept[begin:copied], room)
        if copied < end:
            assert held.embeddings is not None
            self._run_embeddings(held.embeddings[:end], slots, copied)
        if held.num_ready < end:  # those before `begin` may have come from blocks that others had computed
            new = slice(held.num_ready, end)
            for room, kept in self._kept(held):
                kept[new].copy_(read_entries(room[blocks[new], :, offsets[new]]))
            self._memory.keep_prefix(prefix.slot, held, end)

    def _kept(self, held: HeldPrefix) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The cache's keys and values of each layer, and what is kept of virtual tokens: [count, heads, size]."""
        at = 0
        for keys, values in zip(self._cache.keys, self._cache.values, strict=True):
            for room in (keys, values):
                heads, size = room.shape[1], width_of(room)
                yield room, held.past[:, at : at + heads * size].unflatten(1, (heads, size))  # type: ignore[no-untyped-call]
                at += heads * size

    def _run_embeddings(self, embeddings: torch.Tensor, kv_slots: torch.Tensor, first: int) -> None:
        """Run the model over embeddings [n, hidden] from number `first` on, for their keys and values alone."""
        size, count = self._cache.block_size, len(embeddings)
        table = (kv_slots[::size] // size).to(torch.int32)[None]
        context = self._wrapped.context
        for begin in range(first, count, _ROWS_AT_ONCE):
            rows = range(begin, min(begin + _ROWS_AT_ONCE, count))
            positions = torch.arange(rows.start, rows.stop, device=self._device)
            context.batch = Batch(
                token_ids=torch.zeros_like(positions),
                positions=positions,
                kv_slots=kv_slots[rows.start : rows.stop],
                block_tables=table,
                query_starts=torch.tensor([0, len(rows)], dtype=torch.int32, device=self._device),
                context_lens=torch.tensor([rows.stop], dtype=torch.int32, device=self._device),
                num_decode=int(len(rows) == 1),
                starts=(0, len(rows)),
                lens=(rows.stop,),
                logit_rows=torch.tensor([len(rows) - 1], device=self._device),
                # A copy, since layers write into what they are given.
                embeddings=embeddings[rows.start : rows.stop].to(self._wrapped.model.dtype, copy=True),
            )
            try:
                self._wrapped.model(
                    input_ids=context.batch.token_ids[None],
                    position_ids=self._wrapped.position_ids(context.batch),
                    use_cache=False,
                    logits_to_keep=context.batch.logit_rows,
                )
            finally:
                context.batch = None

    def _keep(self, _module: nn.Module, _given: Any, output: Any) -> None:
        self._hidden = output[0][0]

    def hidden(self) -> np.ndarray:
        kept, self._hidden = self._hidden, None
        assert kept is not None, "the last step was asked for hidden states"
        return kept.float().cpu().numpy()

    def _score(self, slot: int, rows: torch.Tensor) -> Answer:
        found = self._heads.of(slot)
        if found is None:
            return None, None
        head, plan = found
        return self._heads.scores(slot, plan, rows), head

    def scores(self) -> list[tuple[np.ndarray | None, Head | None]]:
        scored, self._scored = self._scored, []
        return [(None if found is None else found.cpu().numpy(), head) for found, head in scored]

    def _batch(self, step: StepInput) -> Batch:
        starts = step.query_starts.tolist()
        num_decode = int((np.diff(step.query_starts) == 1).sum())
        token_ids, own_tokens = step.token_ids, None
        if self._memory.vocabularies and int(token_ids.max()) >= self._num_rows:
            is_own = token_ids >= self._num_rows
            own_tokens = self._tensor(np.where(is_own, token_ids, -1))
            token_ids = np.where(is_own, 0, token_ids)
        batch = Batch(
            token_ids=self._tensor(token_ids),
            own_tokens=own_tokens,
            positions=self._tensor(step.positions),
            kv_slots=self._tensor(step.kv_slots),
            block_tables=self._tensor(step.block_tables),
            query_starts=self._tensor(step.query_starts),
            context_lens=self._tensor(step.context_lens),
            num_decode=num_decode,
            starts=tuple(starts),
            lens=tuple(step.context_lens.tolist()),
            logit_rows=self._tensor(step.logit_rows),
            lora=self._plan(step.slots, step.mixes, num_decode),
            logit_lora=self._plan(step.slots[step.logit_rows], step.mixes),
        )
        return batch if not step.states else replace(batch, pieces=self._pieces(batch, step))

    def _pieces(self, batch: Batch, step: StepInput) -> tuple[Piece, ...]:
        store = self._wrapped.states
        assert store is not None, "the model keeps no states"
        states = [
            store.begin(
                each.slot,
                each.start,
                each.sizes,
                committed=each.committed,
                begins_with=each.begins_with,
                snapshots=dict(each.snapshots),
            )
            for each in step.states
        ]
        sizes = [each.sizes for each in step.states]
        return cut(batch, sizes, states, step.slots, lambda slots: self._plan(slots, step.mixes))

    def _plan(self, row_slots: np.ndarray, mixes: Sequence[Parts], num_single: int | None = None) -> LoraPlan | None:
        return plan_of(self._kernel, self._memory, row_slots, mixes, num_single)

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)
