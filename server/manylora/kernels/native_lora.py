"""The low-rank kernels in C++: each adapter's weights are read once per step, at the memory's speed."""

import torch

from manylora.kernels import native
from manylora.kernels.interface import LoraPlan, SiteGroup, add_embedding_
from manylora.kernels.rows import LoraRows
from manylora.lora.memory.device_memory import DeviceMemory


class NativePlan(LoraPlan):
    """One step's rows, for the C++ operator."""

    def __init__(self, rows: LoraRows, memory: DeviceMemory) -> None:
        self.rows = rows
        self.tables = memory.tables
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

    def add_embedding_(self, out: torch.Tensor, token_ids: torch.Tensor, site: int) -> None:
        add_embedding_(out, token_ids, site, self.rows, self._memory)


class NativeKernel:
    """`LoraKernel` of the C++ extension. Follows pointers, so every adapter has memory of its own size."""

    places_per_slab = 1
    mixes_dtypes = True

    def plan(self, rows: LoraRows, memory: DeviceMemory) -> NativePlan:
        return NativePlan(rows, memory)
