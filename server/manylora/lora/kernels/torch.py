"""The low-rank kernels in plain torch operations: the fallback that runs anywhere.

Adapters of one layout lie in slabs, so the matrices of many adapters are one strided view and a batched
matmul multiplies each with its own rows, without copying a weight. Segments with many rows (prefill) get a
plain matmul each.
"""

from dataclasses import dataclass

import numpy as np
import torch

from manylora.lora.kernels import LoraPlan, SiteGroup, add_embedding_
from manylora.lora.layout import Extent
from manylora.lora.memory import DeviceMemory, Slab
from manylora.lora.rows import LoraRows

MAX_BATCHED_ROWS = 4  # a segment with more rows is multiplied on its own


@dataclass(frozen=True, slots=True)
class _SlabRows:
    """One slab's part of a step.

    `low`, `high`: the run of places that a batched matmul covers. `index` int64 [(high - low) * width]: the
    batch's row at each place, row 0 where there is none. `kept` says which of these are real (None: all),
    `targets` their rows in the batch. `large`: (place, rows) of the segments multiplied one by one, the rows of one
    sequence's chunk as a slice.
    """

    slab: Slab
    low: int
    high: int
    width: int
    index: torch.Tensor
    kept: torch.Tensor | None
    targets: torch.Tensor
    large: tuple[tuple[int, torch.Tensor | slice], ...]


class TorchPlan(LoraPlan):
    """One step, grouped by slab."""

    def __init__(self, rows: LoraRows, memory: DeviceMemory) -> None:
        self.rows = rows
        self._memory = memory
        by_slab: dict[int, list[tuple[int, np.ndarray]]] = {}
        order = rows.order.cpu().numpy()
        for index, slot in enumerate(rows.slots):
            place = memory.places[slot]
            mine = order[rows.starts[index] : rows.starts[index + 1]]
            by_slab.setdefault(place.slab, []).append((place.row, mine))
        self._slabs = [_slab_rows(memory.slabs[slab], segments) for slab, segments in by_slab.items()]

    def add_(self, out: torch.Tensor, x: torch.Tensor, group: SiteGroup) -> None:
        wide = _wide(x)
        for part in self._slabs:
            extents = part.slab.layout.extents
            members = [(m, extents[site]) for m, site in enumerate(group.sites) if site in extents]
            if part.high > part.low and members:
                _add_small(out, wide, group, part, members)
            for place, mine in part.large if members else ():
                rows = wide[mine]
                for member, extent in members:
                    a, b = _weights(part.slab, extent, slice(place, place + 1), wide.dtype)
                    _add_product(_columns(out, group, member), mine, rows @ a[0].T, b[0])

    def add_embedding_(self, out: torch.Tensor, token_ids: torch.Tensor, site: int) -> None:
        add_embedding_(out, token_ids, site, self.rows, self._memory)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """The inputs in the dtype that the deltas are made in.

    On a CPU that is float32: a batched matmul of single rows in bfloat16 takes several times as long as widening the
    weights, a few of which are in the cache by then, and multiplying them in float32.
    """
    return x.float() if x.device.type == "cpu" else x


def _weights(slab: Slab, extent: Extent, places: slice, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of some places, for a matmul in `dtype`: views where they are held in it, else converted copies."""
    a, b = slab.stack_a(extent)[places], slab.stack_b(extent)[places]
    if slab.layout.has_scales:
        a = a * slab.stack_scales(extent)[places, :, None]
    return a.to(dtype), b.to(dtype)


def _add_small(
    out: torch.Tensor, wide: torch.Tensor, group: SiteGroup, part: _SlabRows, members: list[tuple[int, Extent]]
) -> None:
    """The batched segments' deltas."""
    gathered = wide.index_select(0, part.index).view(part.high - part.low, part.width, wide.shape[1])
    for member, extent in members:
        a, b = _weights(part.slab, extent, slice(part.low, part.high), wide.dtype)
        delta = torch.bmm(torch.bmm(gathered, a.transpose(1, 2)), b).flatten(0, 1)
        _add_rows(_columns(out, group, member), part.targets, delta if part.kept is None else delta[part.kept])


def _columns(out: torch.Tensor, group: SiteGroup, member: int) -> torch.Tensor:
    """Where a member of the group writes."""
    return out[:, group.offsets[member] : group.offsets[member + 1]]


def _add_product(out: torch.Tensor, rows: torch.Tensor | slice, low: torch.Tensor, b: torch.Tensor) -> None:
    """out[rows] += low @ b, in one operation where the dtypes and the rows allow it."""
    if isinstance(rows, slice) and out.dtype == low.dtype:
        out[rows].addmm_(low, b)
    elif isinstance(rows, slice):
        out[rows].add_(low @ b)
    else:
        _add_rows(out, rows, low @ b)


def _add_rows(out: torch.Tensor, rows: torch.Tensor, delta: torch.Tensor) -> None:
    """out[rows] += delta for rows that are all different: several times faster than `index_add_`.

    Where delta is wider than out, the sum is rounded once.
    """
    out.index_copy_(0, rows, (out.index_select(0, rows) + delta).to(out.dtype))


def _slab_rows(slab: Slab, segments: list[tuple[int, np.ndarray]]) -> _SlabRows:
    def indices(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(slab.data.device)

    small = [(place, mine) for place, mine in segments if len(mine) <= MAX_BATCHED_ROWS]
    large = tuple((p, _run(m) or indices(m)) for p, m in segments if len(m) > MAX_BATCHED_ROWS)
    if not small:
        nothing = indices(np.empty(0))
        return _SlabRows(slab, 0, 0, 0, nothing, None, nothing, large)
    low = min(place for place, _ in small)
    high = max(place for place, _ in small) + 1
    width = max(len(mine) for _, mine in small)
    index = np.full((high - low, width), -1, dtype=np.int64)
    for place, mine in small:
        index[place - low, : len(mine)] = mine
    flat = index.reshape(-1)
    kept = np.flatnonzero(flat >= 0)
    return _SlabRows(
        slab,
        low,
        high,
        width,
        indices(np.maximum(flat, 0)),
        None if kept.size == flat.size else indices(kept),
        indices(flat[kept]),
        large,
    )


def _run(rows: np.ndarray) -> slice | None:
    """Rows without a gap, in order, as a slice."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else None


class TorchKernel:
    """`LoraKernel` of torch operations."""

    name = "torch"
    places_per_slab = 32
    mixes_dtypes = False

    def plan(self, rows: LoraRows, memory: DeviceMemory) -> TorchPlan:
        return TorchPlan(rows, memory)
