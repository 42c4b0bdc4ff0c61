"""The low-rank kernels in C++: each adapter's weights are read once per step, at the memory's speed."""

import torch

from manylora.kernels import native
from manylora.kernels.interface import LoraPlan, SiteGroup, add_embedding_, add_experts_
from manylora.kernels.rows import LoraRows
from manylora.lora.memory.device_memory import DeviceMemory


class NativePlan(LoraPlan):
    """One step's rows, for the C++ operator."""

    def __init__(self, rows: LoraRows, memory: DeviceMemory) -> None:
        self.rows = rows
        self.tables = memory.tables
        self.inputs = memory.inputs.entries
        self.outputs = memory.outputs.entries
        self._memory = memory

    def add_(self, out: torch.Tensor, x: torch.Tensor, group: SiteGroup) -> None:
        rows = self.rows
        sites = group.sites
        native.add_lora_(
            out,
            x,
            self.tables[sites.start : sites.stop],
            group.offsets_i32,
            rows.order,
            rows.segment_slots,
            rows.segment_starts,
        )

        self.change_output_(out, group)

    def change_output_(self, out: torch.Tensor, group: SiteGroup) -> None:
        changed = self.rows.changed
        if changed is not None and any(changed.outputs[site] for site in group.sites):
            self._change(out, self.outputs, group.sites, group.offsets_i32)

    def change_input_(self, x: torch.Tensor, group: SiteGroup) -> None:
        self._change(x, self.inputs, group.sites, torch.tensor((0, x.shape[1]), dtype=torch.int32))

    def _change(self, values: torch.Tensor, tables: torch.Tensor, sites: range, offsets: torch.Tensor) -> None:
        rows = self.rows
        native.change_output_(
            values, tables[sites.start : sites.stop], offsets, rows.order, rows.segment_slots, rows.segment_starts
        )

    def add_embedding_(self, out: torch.Tensor, token_ids: torch.Tensor, site: int) -> None:
        add_embedding_(out, token_ids, site, self.rows, self._memory)

    def add_experts_(
        self, out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, bounds: list[int], site: int
    ) -> None:
        add_experts_(out, x, rows, bounds, site, self.rows, self._memory)


class NativeKernel:
    """`LoraKernel` of the C++ extension. Follows pointers, so every adapter has memory of its own size."""

    places_per_slab = 1
    mixes_dtypes = True

    def plan(self, rows: LoraRows, memory: DeviceMemory) -> NativePlan:
        return NativePlan(rows, memory)
