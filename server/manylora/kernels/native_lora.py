"""The low-rank kernels in C++: each adapter's weights are read once per step, at the memory's speed."""

from functools import cached_property

import numpy as np
import torch

from manylora.kernels import native
from manylora.kernels.interface import LoraPlan, SiteGroup, add_embedding_, mixed_segments
from manylora.kernels.mixes import add_embedding_mixes_
from manylora.kernels.rows import LoraRows, MixedRows
from manylora.kernels.token_rows import add_row_logits_, add_token_rows_, have_token_rows
from manylora.lora.memory.device_memory import DTYPE_CODES, DeviceMemory, TableEntry

_SIZES = torch.tensor([dtype.itemsize for dtype in sorted(DTYPE_CODES, key=DTYPE_CODES.__getitem__)])
_FIELD = {name: place for place, name in enumerate(TableEntry._fields)}


class NativePlan(LoraPlan):
    """One step's rows, for the C++ operator."""

    def __init__(self, rows: LoraRows, memory: DeviceMemory) -> None:
        self.rows = rows
        self.tables = memory.tables
        self.inputs = memory.inputs.entries
        self.outputs = memory.outputs.entries
        self._memory = memory
        self._has_token_rows = have_token_rows(rows, memory)
        self.own_logits = {}

    def add_(self, out: torch.Tensor, x: torch.Tensor, group: SiteGroup, given: torch.Tensor | None = None) -> None:
        rows, mixes = self.rows, self.rows.mixes
        sites = group.sites
        if self._has_token_rows:
            self.own_logits |= add_row_logits_(out, x, group.first, rows, self._memory, is_mixed=False)
        if rows.slots and any(rows.touched[site] for site in sites):
            native.add_lora_(
                out,
                x,
                self.tables[sites.start : sites.stop],
                group.offsets_i32,
                rows.order,
                rows.segment_slots,
                rows.segment_starts,
            )
            self._change_alone(out, group)
        if mixes is not None and any(mixes.touched[site] for site in sites):
            self._mix(out, x if given is None else given, group, mixes)
            if self._has_token_rows:
                add_row_logits_(out, x, group.first, rows, self._memory, is_mixed=True)

    def change_output_(self, out: torch.Tensor, group: SiteGroup) -> None:
        self._change_alone(out, group)
        changed = None if self.rows.mixes is None else self.rows.mixes.changed
        if changed is not None and any(changed.outputs[site] for site in group.sites):
            self._change_mixes(out, self.outputs, group.sites, group.offsets_i32)

    def change_input_(self, x: torch.Tensor, group: SiteGroup) -> None:
        rows, site = self.rows, group.first
        offsets = torch.tensor((0, x.shape[1]), dtype=torch.int32)
        if rows.changed is not None and rows.changed.inputs[site]:
            self._change(x, self.inputs, group.sites, offsets)
        if rows.mixes is not None and rows.mixes.changed is not None and rows.mixes.changed.inputs[site]:
            self._change_mixes(x, self.inputs, group.sites, offsets)

    def _change_alone(self, out: torch.Tensor, group: SiteGroup) -> None:
        changed = self.rows.changed
        if changed is not None and any(changed.outputs[site] for site in group.sites):
            self._change(out, self.outputs, group.sites, group.offsets_i32)

    def _change(self, values: torch.Tensor, tables: torch.Tensor, sites: range, offsets: torch.Tensor) -> None:
        rows = self.rows
        native.change_output_(
            values, tables[sites.start : sites.stop], offsets, rows.order, rows.segment_slots, rows.segment_starts
        )

    def _mix(self, out: torch.Tensor, x: torch.Tensor, group: SiteGroup, mixes: MixedRows) -> None:
        sites = slice(group.sites.start, group.sites.stop)
        native.add_mixes_(
            out, x, self.tables[sites], self.inputs[sites], self.outputs[sites], group.offsets_i32, *_arguments(mixes)
        )

    def _change_mixes(self, values: torch.Tensor, tables: torch.Tensor, sites: range, offsets: torch.Tensor) -> None:
        assert self.rows.mixes is not None
        found = tables[sites.start : sites.stop]
        native.add_mixes_(values, None, None, None, found, offsets, *_arguments(self.rows.mixes))

    def add_embedding_(self, out: torch.Tensor, token_ids: torch.Tensor, group: SiteGroup, scale: float) -> None:
        rows = self.rows
        if rows.touched[group.first]:
            if self._has_token_rows:
                add_token_rows_(out, token_ids, group.first, scale, rows, self._memory, is_mixed=False)
            add_embedding_(out, token_ids, group.first, scale, rows, self._memory)
            self._change_alone(out, group)
        if rows.mixes is not None:
            add_embedding_mixes_(out, token_ids, group.first, scale, rows.mixes, self._memory)
            if self._has_token_rows:
                add_token_rows_(out, token_ids, group.first, scale, rows, self._memory, is_mixed=True)

    def add_own_tokens_(self, out: torch.Tensor, token_ids: torch.Tensor, group: SiteGroup, scale: float) -> None:
        add_token_rows_(out, token_ids, group.first, scale, self.rows, self._memory, is_mixed=False)

    def add_experts_(
        self, out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, bounds: list[int], site: int
    ) -> None:
        owner, used, pair_rows = self.rows, self._used, rows.numpy()
        tables = expert_tables(self.tables[site][torch.from_numpy(used)], len(bounds))
        num_rows = max(int(each.max()) for each in (pair_rows, owner.host_order) if each.size) + 1
        slots = np.full(num_rows, -1, dtype=np.int32)
        slots[owner.host_order] = np.repeat(np.searchsorted(used, owner.slots), np.diff(owner.starts))
        _add_pairs_(out, x, slots[pair_rows], bounds, tables)
        for parts, mine in mixed_segments(owner.mixes) if owner.mixes is not None else ():
            is_mine = np.isin(pair_rows, mine.numpy())
            places = torch.from_numpy(np.flatnonzero(is_mine))
            for slot, weight in parts:
                delta = torch.zeros_like(out)
                place = np.searchsorted(used, slot)
                _add_pairs_(delta, x, np.where(is_mine, place, -1).astype(np.int32), bounds, tables)
                out[places] += delta[places] * weight

    @cached_property
    def _used(self) -> np.ndarray:
        """The step's slots, int64 in their order: of all the others no table is made for the experts."""
        return np.array(sorted(self.rows.all_slots), dtype=np.int64)


def expert_tables(entries: torch.Tensor, count: int) -> torch.Tensor:
    """Of a site's entries [slots, TABLE_FIELDS] those of each of its `count` experts: [count, 1, slots, TABLE_FIELDS].

    Their ranks lie one expert after the other.
    """
    found = entries.repeat(count, 1, 1)
    rank, size = entries[:, _FIELD["rank"]] // count, _SIZES[entries[:, _FIELD["dtype"]]]
    skipped = torch.arange(count)[:, None] * rank
    found[..., _FIELD["rank"]] = rank
    found[..., _FIELD["a"]] += skipped * entries[:, _FIELD["in_features"]] * size
    found[..., _FIELD["b"]] += skipped * entries[:, _FIELD["out_features"]] * size
    found[..., _FIELD["scales"]] += skipped * torch.float32.itemsize * (entries[:, _FIELD["scales"]] != 0)
    return found[:, None]


def _add_pairs_(out: torch.Tensor, x: torch.Tensor, slots: np.ndarray, bounds: list[int], tables: torch.Tensor) -> None:
    """`out` [P, out] += the deltas of pairs in the order of their experts, each with the adapter in one of `slots`."""
    offsets, begin = torch.tensor((0, out.shape[1]), dtype=torch.int32), 0
    for expert, end in enumerate(bounds):
        mine = slots[begin:end]
        order = np.flatnonzero(mine >= 0).astype(np.int32)
        if order.size:
            order = order[np.argsort(mine[order], kind="stable")]
            named, starts = np.unique(mine[order], return_index=True)
            segments = np.append(starts, order.size).astype(np.int32)
            native.add_lora_(
                out[begin:end],
                x[begin:end],
                tables[expert],
                offsets,
                torch.from_numpy(order),
                torch.from_numpy(named.astype(np.int32)),
                torch.from_numpy(segments),
            )
        begin = end


def _arguments(mixes: MixedRows) -> tuple[torch.Tensor, ...]:
    return mixes.order, mixes.row_starts, mixes.part_starts, mixes.part_slots, mixes.part_weights


class NativeKernel:
    """`LoraKernel` of the C++ extension. Follows pointers, so every adapter has memory of its own size."""

    places_per_slab = 1
    mixes_dtypes = True

    def plan(self, rows: LoraRows, memory: DeviceMemory) -> NativePlan:
        return NativePlan(rows, memory)
