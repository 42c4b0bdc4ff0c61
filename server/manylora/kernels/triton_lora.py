"""The low-rank kernels on a GPU: a few launches for a group of sites, whatever adapters a step holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import triton

from manylora.kernels.interface import LoraPlan, SiteGroup, add_experts_
from manylora.kernels.mixes import add_embedding_mixes_, add_mixes_, change_mixed_inputs_, change_mixed_outputs_
from manylora.kernels.programs import lora as programs
from manylora.kernels.rows import LoraRows
from manylora.kernels.tiles import cut_tiles
from manylora.kernels.token_rows import add_row_logits_, add_token_rows_, have_token_rows
from manylora.lora.memory.device_memory import DTYPE_CODES, OUTPUT_FIELDS, TABLE_FIELDS, DeviceMemory

__all__ = ["MANY", "SINGLE", "Sizes", "TritonKernel", "TritonPlan", "is_interpreted"]

_SEVERAL: Final = -1  # adapters of several formats
_ALIGNMENT: Final = 16  # elements
_WIDTH_STEP: Final = 16  # of the low dimensions' rows
_MANY_INPUTS: Final = 2048
_FEW_PARTS: Final = 4
# Loads ahead in `expand`, whose loop over ranks has one round for most adapters: more only take shared memory.
_EXPAND_STAGES: Final = 2


@dataclass(frozen=True, slots=True)
class Sizes:
    """Rows, columns, inputs and low dimensions that a program takes at a time, and into how many parts A x is cut.

    They are the same for every number of rows, so that a row's sums are made in one order whatever is beside it.
    """

    rows: int
    columns: int
    inputs: int
    ranks: int
    parts: int
    warps: int
    warps_of_several: int  # where a program has code for each format, which takes registers

    def splits(self, in_features: int) -> int:
        """Parts of a row's products with A that are summed apart."""
        return self.parts if in_features >= _MANY_INPUTS else min(self.parts, _FEW_PARTS)


# Of sequences with one row each: few rows, so that little happens at once unless sums are cut into parts. Of prompts.
SINGLE: Final = Sizes(rows=16, columns=128, inputs=128, ranks=16, parts=8, warps=4, warps_of_several=8)
MANY: Final = Sizes(rows=64, columns=64, inputs=64, ranks=32, parts=1, warps=4, warps_of_several=4)


def is_interpreted() -> bool:
    """Whether programs run in Triton's interpreter, which computes with the bits of bfloat16 as if with numbers."""
    return bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True, slots=True)
class _Part:
    """Tiles on the device, int32 [n, 3], and in what sizes they are computed."""

    tiles: torch.Tensor
    count: int
    sizes: Sizes


class TritonPlan(LoraPlan):
    """One step's rows in tiles."""

    def __init__(self, kernel: "TritonKernel", rows: LoraRows, memory: DeviceMemory) -> None:
        self.rows = rows
        self._kernel = kernel
        self._memory = memory
        self._has_token_rows = have_token_rows(rows, memory)
        self.own_logits = {}
        cut = cut_tiles(rows, SINGLE.rows, MANY.rows)
        self._parts = [
            _Part(torch.from_numpy(tiles).to(memory.device), len(tiles), sizes)
            for tiles, sizes in ((cut.single, SINGLE), (cut.many, MANY))
            if len(tiles)
        ]
        slots = list(rows.slots)
        formats = set(memory.formats[slots].tolist())
        self._format = formats.pop() if len(formats) == 1 else _SEVERAL
        self._dense: list[bool] = np.any(memory.has_dense[:, slots], axis=1).tolist()
        self._ranks: list[int] = memory.ranks[:, slots].max(axis=1, initial=0).tolist()

    def add_(self, out: torch.Tensor, x: torch.Tensor, group: SiteGroup, given: torch.Tensor | None = None) -> None:
        if self._has_token_rows:
            self.own_logits |= add_row_logits_(out, x, group.first, self.rows, self._memory, is_mixed=False)
        for part in self._parts:
            if any(self._ranks[site] for site in group.sites):
                self._add_low_rank(out, x, group, part)
            if any(self._dense[site] for site in group.sites):
                self._add_dense(out, x, group, part)
        self._change_alone(out, group)
        if self.rows.mixes is not None:
            add_mixes_(out, x if given is None else given, group, self.rows.mixes, self._memory)
            if self._has_token_rows:
                add_row_logits_(out, x, group.first, self.rows, self._memory, is_mixed=True)

    def _add_low_rank(self, out: torch.Tensor, x: torch.Tensor, group: SiteGroup, part: _Part) -> None:
        sites, in_features = group.sites, x.shape[1]
        width = -(-max(self._ranks[site] for site in sites) // _WIDTH_STEP) * _WIDTH_STEP
        sizes, num_rows = part.sizes, len(self.rows.host_order)
        splits = sizes.splits(in_features)
        low = torch.empty(splits * len(sites) * num_rows * width, dtype=torch.float32, device=x.device)
        tables = self._memory.tables[sites.start : sites.stop]
        columns = self._kernel.columns(group, sizes.columns, x.device)
        is_aligned = _is_aligned(in_features, *group.offsets)
        constants: dict[str, Any] = {
            "FIELDS": TABLE_FIELDS, "FORMAT": self._format, "ALIGNED": is_aligned, "BM": sizes.rows, "BR": sizes.ranks,
            "SPLITS": splits, "num_warps": self._num_warps(sizes),
        }  # fmt: skip
        programs.shrink[part.count, len(sites), splits](
            low, x, tables, self.rows.order, part.tiles, num_rows, in_features, x.stride(0), tables.stride(0), width,
            WIDE=self._is_wide(x.dtype), BK=sizes.inputs, **constants,
        )  # fmt: skip
        programs.expand[part.count, len(columns)](
            out, low, tables, self.rows.order, part.tiles, columns, num_rows, len(sites) * num_rows * width,
            out.stride(0), tables.stride(0), width,
            WIDE=self._is_wide(x.dtype, torch.bfloat16), BN=sizes.columns, num_stages=_EXPAND_STAGES, **constants,
        )  # fmt: skip

    def _num_warps(self, sizes: Sizes) -> int:
        return sizes.warps_of_several if self._format == _SEVERAL else sizes.warps

    def _is_wide(self, *dtypes: torch.dtype) -> bool:
        """Whether weights are to be multiplied in float32, as they do not fit into one of `dtypes`."""
        fitting = ({DTYPE_CODES[dtype], DTYPE_CODES[torch.int8]} for dtype in dtypes)
        return is_interpreted() or dtypes[0].itemsize > 2 or not all(self._format in each for each in fitting)

    def _add_dense(self, out: torch.Tensor, x: torch.Tensor, group: SiteGroup, part: _Part) -> None:
        sizes, sites = part.sizes, group.sites
        tables = self._memory.tables[sites.start : sites.stop]
        columns = self._kernel.columns(group, sizes.columns, x.device)
        programs.add_dense[part.count, len(columns)](
            out, x, tables, self.rows.order, part.tiles, columns, x.shape[1], x.stride(0), out.stride(0),
            tables.stride(0), FIELDS=TABLE_FIELDS, FORMAT=self._format,
            ALIGNED=_is_aligned(x.shape[1], *group.offsets), WIDE=self._is_wide(x.dtype), BM=sizes.rows,
            BN=sizes.columns, BK=sizes.inputs, num_warps=self._num_warps(sizes),
        )  # fmt: skip

    def change_output_(self, out: torch.Tensor, group: SiteGroup) -> None:
        self._change_alone(out, group)
        if self.rows.mixes is not None:
            for member, site in enumerate(group.sites):
                columns = out[:, group.offsets[member] : group.offsets[member + 1]]
                change_mixed_outputs_(columns, site, self.rows.mixes, self._memory)

    def change_input_(self, x: torch.Tensor, group: SiteGroup) -> None:
        changed = self.rows.changed
        if changed is not None and changed.inputs[group.first]:
            self._change(x, self._memory.inputs.entries, group.first, (0, x.shape[1]))
        if self.rows.mixes is not None:
            change_mixed_inputs_(x, group.first, self.rows.mixes, self._memory)

    def _change_alone(self, out: torch.Tensor, group: SiteGroup) -> None:
        changed = self.rows.changed
        if changed is not None and any(changed.outputs[site] for site in group.sites):
            self._change(out, self._memory.outputs.entries, group.first, group.offsets)

    def _change(self, values: torch.Tensor, entries: torch.Tensor, first: int, offsets: Sequence[int]) -> None:
        tables = entries[first : first + len(offsets) - 1]
        for part in self._parts:
            columns = self._kernel.columns_of(tuple(offsets), part.sizes.columns, values.device)
            programs.change[part.count, len(columns)](
                values, tables, self.rows.order, part.tiles, columns, values.stride(0), tables.stride(0),
                FIELDS=OUTPUT_FIELDS, ALIGNED=_is_aligned(*offsets), BM=part.sizes.rows, BN=part.sizes.columns,
            )  # fmt: skip

    def add_embedding_(self, out: torch.Tensor, token_ids: torch.Tensor, group: SiteGroup, scale: float) -> None:
        rows, width = self.rows, out.shape[1]
        if rows.touched[group.first]:
            if self._has_token_rows:
                add_token_rows_(out, token_ids, group.first, scale, rows, self._memory, is_mixed=False)
            for part in self._parts:
                sizes = part.sizes
                programs.embed[part.count, triton.cdiv(width, sizes.columns)](
                    out, token_ids, self._memory.tables[group.first], rows.order, part.tiles, width, float(scale),
                    out.stride(0), FIELDS=TABLE_FIELDS, FORMAT=self._format, ALIGNED=_is_aligned(width), BM=sizes.rows,
                    BN=sizes.columns, BR=sizes.ranks,
                )  # fmt: skip
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
        add_experts_(out, x, rows, bounds, site, self.rows, self._memory)


def _is_aligned(*sizes: int) -> bool:
    return not any(size % _ALIGNMENT for size in sizes)


class TritonKernel:
    """`LoraKernel` in Triton. Follows pointers, so every adapter has memory of its own size, rank and format."""

    places_per_slab = 1
    mixes_dtypes = True

    def __init__(self) -> None:
        self._columns: dict[tuple[tuple[int, ...], int], torch.Tensor] = {}

    def plan(self, rows: LoraRows, memory: DeviceMemory) -> TritonPlan:
        return TritonPlan(self, rows, memory)

    def columns(self, group: SiteGroup, size: int, device: torch.device) -> torch.Tensor:
        """Blocks of at most `size` of the group's columns."""
        return self.columns_of(group.offsets, size, device)

    def columns_of(self, offsets: tuple[int, ...], size: int, device: torch.device) -> torch.Tensor:
        """Blocks of at most `size` columns between `offsets`, int32 [blocks, 4]; see `programs.lora`.

        Made once for each shape of a model's linears.
        """
        key = offsets, size
        if key not in self._columns:
            blocks = [
                (member, first, offsets[member + 1] - begin, begin)
                for member, begin in enumerate(offsets[:-1])
                for first in range(0, offsets[member + 1] - begin, size)
            ]
            self._columns[key] = torch.tensor(blocks, dtype=torch.int32, device=device)
        return self._columns[key]
