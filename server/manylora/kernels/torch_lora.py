"""The low-rank kernels in plain torch operations: the fallback that runs anywhere.

Adapters of one layout lie in slabs, so the matrices of many adapters are one strided view and a batched
matmul multiplies each with its own rows, without copying a weight. Segments with many rows (prefill) are
multiplied a few at once where their ranks are small, and else one by one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from manylora.kernels.interface import (
    LoraPlan,
    SiteGroup,
    add_embedding_,
    add_experts_,
    change_input_,
    change_output_,
    segments,
)
from manylora.kernels.mixes import add_embedding_mixes_, add_mixes_, change_mixed_inputs_, change_mixed_outputs_
from manylora.kernels.rows import LoraRows
from manylora.kernels.token_rows import add_row_logits_, add_token_rows_, have_token_rows
from manylora.lora.memory.device_memory import DeviceMemory, Slab
from manylora.lora.memory.terms import LowRankExtent

MAX_BATCHED_ROWS = 4  # segments with more rows are multiplied as matrices of their own, or in groups
# A group of segments is one operation that the cores share, instead of one each, but every row is multiplied with all
# of the group's adapters. So it pays while an adapter's low dimensions of one row take no more bytes than this: 16 in
# float32, 32 in bfloat16. Steps of 512 rows in 8 segments, in groups / one by one: rank 16 float32 0.70, bfloat16 0.49;
# rank 64 1.8 and 1.27, so about 0.8 for rank 32 in bfloat16.
MAX_GROUPED_BYTES = 64
MAX_GROUP = 8  # segments
MAX_GROUP_ROWS = 512  # from the first to the last: with more to multiply, the operations saved count for less


@dataclass(frozen=True, slots=True)
class _Small:
    """One slab's segments of few rows.

    `low`, `high`: the run of places that a batched matmul covers. `index` int64 [(high - low) * width]: the
    batch's row at each place, row 0 where there is none. In the order of the batch's rows: `targets` the rows that
    there are, `found` where in `index` each is (None: all, in this order), `places` the place of each. `bags`: what
    `bag` has made so far.
    """

    low: int
    high: int
    width: int
    index: torch.Tensor
    found: torch.Tensor | None
    targets: torch.Tensor | slice
    places: torch.Tensor
    bags: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def bag(self, padded: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which rows of a stack of Bs, [places * padded, out], each row's delta is a weighted sum of.

        int64 [R * padded], and where each row's begin: int64 [R].
        """
        if padded not in self.bags:
            rows = self.places[:, None] * padded + torch.arange(padded, device=self.places.device)
            self.bags[padded] = rows.flatten(), torch.arange(0, rows.numel(), padded, device=rows.device)
        return self.bags[padded]


@dataclass(frozen=True, slots=True)
class _Group:
    """Segments that are multiplied at once.

    `size`: how many, S. `places` [S]: where their adapters are, ascending (a slice where there is none between them).
    `span`: the rows among which all of theirs are. `owners` int64 [rows of the span]: which of the S each row is of, -1
    for none. `masks`: what `foreign` has made so far.
    """

    size: int
    places: torch.Tensor | slice
    span: slice
    owners: torch.Tensor
    masks: dict[int, torch.Tensor] = field(default_factory=dict)

    def foreign(self, padded: int) -> torch.Tensor:
        """Which low dimensions of all adapters are not a row's own: bool [rows of the span, S * padded]."""
        if padded not in self.masks:
            dimensions = torch.arange(self.size * padded, device=self.owners.device)
            self.masks[padded] = self.owners[:, None] != dimensions // padded
        return self.masks[padded]


_Segment = tuple[int, torch.Tensor | slice]  # (place, rows)


@dataclass(frozen=True, slots=True)
class _Large:
    """One slab's segments of many rows.

    `groups`, and those in none, `rest`: too far from the others, rows that are not a run, and adapters that may hold a
    NaN, which times zero is one too. `segments`: all of them, for modules whose rank is too large for groups.
    """

    groups: tuple[_Group, ...]
    rest: tuple[_Segment, ...]
    segments: tuple[_Segment, ...]


@dataclass(frozen=True, slots=True)
class _SlabRows:
    """One slab's part of a step."""

    slab: Slab
    small: _Small | None
    large: _Large | None


class TorchPlan(LoraPlan):
    """One step, grouped by slab."""

    def __init__(self, kernel: "TorchKernel", rows: LoraRows, memory: DeviceMemory) -> None:
        self.rows = rows
        self._kernel = kernel
        self._memory = memory
        slabs: dict[int, Slab] = {}
        by_slab: dict[int, list[tuple[int, np.ndarray]]] = {}
        for index, slot in enumerate(rows.slots):
            slab, place = memory.locate(slot)
            mine = rows.host_order[rows.starts[index] : rows.starts[index + 1]]
            slabs[id(slab)] = slab
            by_slab.setdefault(id(slab), []).append((place, mine))
        self._has_token_rows = have_token_rows(rows, memory)
        self.own_logits = {}
        self._has_dense = any(slab.layout.dense for slab in slabs.values())
        self._slabs = [_slab_rows(slabs[key], segments) for key, segments in by_slab.items()]

    def add_(self, out: torch.Tensor, x: torch.Tensor, group: SiteGroup, given: torch.Tensor | None = None) -> None:
        # A matmul of single rows in a type without instructions takes several times as long as widening the weights, a
        # few of which are in the cache by then, and multiplying them.
        wide = x if self._kernel.multiplies(x.dtype) else x.float()
        if self._has_token_rows:
            self.own_logits |= add_row_logits_(out, x, group.first, self.rows, self._memory, is_mixed=False)
        for part in self._slabs:
            extents = part.slab.layout.low_rank
            members = [
                (_columns(out, group, m), extents[site]) for m, site in enumerate(group.sites) if site in extents
            ]
            if part.small is not None and members:
                in_bags = self._kernel.sums_in_bags and wide.element_size() == 2
                _add_small(wide, part.slab, part.small, members, in_bags=in_bags)
            if part.large is not None and members:
                _add_large(wide, part.slab, part.large, members)

        if self._has_dense:
            _add_dense(out, wide, group, self.rows, self._memory)
        change_output_(out, group, self.rows, self._memory)
        if self.rows.mixes is not None:
            add_mixes_(out, x if given is None else given, group, self.rows.mixes, self._memory)
            if self._has_token_rows:
                add_row_logits_(out, x, group.first, self.rows, self._memory, is_mixed=True)

    def change_output_(self, out: torch.Tensor, group: SiteGroup) -> None:
        change_output_(out, group, self.rows, self._memory)
        if self.rows.mixes is not None:
            for member, site in enumerate(group.sites):
                change_mixed_outputs_(_columns(out, group, member), site, self.rows.mixes, self._memory)

    def change_input_(self, x: torch.Tensor, group: SiteGroup) -> None:
        change_input_(x, group, self.rows, self._memory)
        if self.rows.mixes is not None:
            change_mixed_inputs_(x, group.first, self.rows.mixes, self._memory)

    def add_embedding_(self, out: torch.Tensor, token_ids: torch.Tensor, group: SiteGroup, scale: float) -> None:
        rows = self.rows
        if rows.touched[group.first]:
            if self._has_token_rows:
                add_token_rows_(out, token_ids, group.first, scale, rows, self._memory, is_mixed=False)
            add_embedding_(out, token_ids, group.first, scale, rows, self._memory)
            change_output_(out, group, self.rows, self._memory)
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


def _add_dense(out: torch.Tensor, wide: torch.Tensor, group: SiteGroup, rows: LoraRows, memory: DeviceMemory) -> None:
    """The deltas of dense terms, one adapter after the other: each is as large as the base's own matrix."""
    for member, site in enumerate(group.sites):
        for slot, mine in segments(rows):
            found = memory.dense(slot, site)
            if found is not None:
                matrix, scales = found
                delta = wide[mine] @ matrix.to(wide.dtype).T
                _add_rows(_columns(out, group, member), mine, delta if scales is None else delta * scales)


def _weights(
    slab: Slab, extent: LowRankExtent, places: slice | torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of some places, for a matmul in `dtype`: as they are where they are held in it, else converted copies."""
    a, b = slab.stack_a(extent)[places], slab.stack_b(extent)[places]
    if slab.layout.has_scales:
        a = a * slab.stack_scales(extent)[places, :, None]
    return a.to(dtype), b.to(dtype)


def _add_small(
    wide: torch.Tensor, slab: Slab, part: _Small, members: list[tuple[torch.Tensor, LowRankExtent]], *, in_bags: bool
) -> None:
    """The deltas of segments of few rows, to each member's columns of the output."""
    gathered = wide.index_select(0, part.index).view(part.high - part.low, part.width, wide.shape[1])
    for out, extent in members:
        a, b = _weights(slab, extent, slice(part.low, part.high), wide.dtype)
        low = torch.bmm(gathered, a.transpose(1, 2))
        if in_bags:
            _add_rows(out, part.targets, _weighted_sums(b, _found(low, part), part))
        else:
            _add_rows(out, part.targets, _found(torch.bmm(low, b), part))


def _weighted_sums(b: torch.Tensor, low: torch.Tensor, part: _Small) -> torch.Tensor:
    """Each row of `low` [R, padded] by its own adapter's B [padded, out], of the stack `b`.

    A product of one row is a weighted sum of B's rows, and an embedding bag reads these at twice the rate of a batched
    matmul on a CPU, in 16 bits; in float32 the matmul is as fast.
    """
    rows, starts = part.bag(b.shape[1])
    sums: torch.Tensor = torch.embedding_bag(b.flatten(0, 1), rows, starts, False, 0, False, low.flatten())[0]
    return sums


def _found(batched: torch.Tensor, part: _Small) -> torch.Tensor:
    """From [places, width, n] the rows that there are, [R, n]."""
    flat = batched.flatten(0, 1)
    return flat if part.found is None else flat.index_select(0, part.found)


def _add_large(wide: torch.Tensor, slab: Slab, part: _Large, members: list[tuple[torch.Tensor, LowRankExtent]]) -> None:
    """Add to each member's output the deltas of the segments that have many rows.

    Each member has a rank of its own in a layout, so each is multiplied in groups or not.
    """
    for out, extent in members:
        in_groups = extent.padded * wide.element_size() <= MAX_GROUPED_BYTES
        for group in part.groups if in_groups else ():
            a, b = _weights(slab, extent, group.places, wide.dtype)
            low = wide[group.span] @ a.flatten(0, 1).T
            low.masked_fill_(group.foreign(extent.padded), 0)
            _add_product(out, group.span, low, b.flatten(0, 1))
        for place, rows in part.rest if in_groups else part.segments:
            a, b = _weights(slab, extent, slice(place, place + 1), wide.dtype)
            _add_product(out, rows, wide[rows] @ a[0].T, b[0])


def _columns(out: torch.Tensor, group: SiteGroup, member: int) -> torch.Tensor:
    """Where a member of the group writes."""
    if len(group.offsets) == 2:
        return out
    return out[:, group.offsets[member] : group.offsets[member + 1]]


def _add_product(out: torch.Tensor, rows: torch.Tensor | slice, low: torch.Tensor, b: torch.Tensor) -> None:
    """out[rows] += low @ b, in one operation where the dtypes and the rows allow it."""
    if isinstance(rows, slice) and out.dtype == low.dtype:
        out[rows].addmm_(low, b)
    else:
        _add_rows(out, rows, low @ b)


def _add_rows(out: torch.Tensor, rows: torch.Tensor | slice, delta: torch.Tensor) -> None:
    """out[rows] += delta for rows that are all different: several times faster than `index_add_`.

    Where delta is wider than out, the sum is rounded once.
    """
    if isinstance(rows, slice):
        out[rows].add_(delta)
    else:
        out.index_copy_(0, rows, (out.index_select(0, rows) + delta).to(out.dtype))


def _slab_rows(slab: Slab, segments: list[tuple[int, np.ndarray]]) -> _SlabRows:
    device = slab.data.device
    small = [(place, mine) for place, mine in segments if len(mine) <= MAX_BATCHED_ROWS]
    large = [(place, mine) for place, mine in segments if len(mine) > MAX_BATCHED_ROWS]
    return _SlabRows(
        slab, _small(small, device) if small else None, _large(large, slab.finite, device) if large else None
    )


def _small(segments: list[tuple[int, np.ndarray]], device: torch.device) -> _Small:
    low = min(place for place, _ in segments)
    high = max(place for place, _ in segments) + 1
    width = max(len(mine) for _, mine in segments)
    index = np.full((high - low, width), -1, dtype=np.int64)
    for place, mine in segments:
        index[place - low, : len(mine)] = mine
    flat = index.reshape(-1)
    found = np.flatnonzero(flat >= 0)
    found = found[np.argsort(flat[found])]
    targets = flat[found]
    is_all = found.size == flat.size and bool((found == np.arange(flat.size)).all())
    return _Small(
        low,
        high,
        width,
        _indices(np.maximum(flat, 0), device),
        None if is_all else _indices(found, device),
        _run(targets) or _indices(targets, device),
        _indices(found // width, device),
    )


def _large(segments: list[tuple[int, np.ndarray]], finite: set[int], device: torch.device) -> _Large:
    found: list[_Segment] = []
    runs: list[tuple[int, slice]] = []
    for place, mine in sorted(segments, key=lambda segment: int(segment[1][0])):
        run = _run(mine)
        found.append((place, run or _indices(mine, device)))
        if run is not None and place in finite:
            runs.append((place, run))
    groups = _neighbours(runs)
    grouped = {place for group in groups for place, _ in group}
    rest = tuple(segment for segment in found if segment[0] not in grouped)
    return _Large(tuple(_group(group, device) for group in groups), rest, tuple(found))


def _neighbours(runs: list[tuple[int, slice]]) -> list[list[tuple[int, slice]]]:
    """(place, rows) in the order of their rows, in groups of two or more: few segments, close to each other."""
    groups: list[list[tuple[int, slice]]] = []
    for place, rows in runs:
        if groups and len(groups[-1]) < MAX_GROUP and rows.stop - groups[-1][0][1].start <= MAX_GROUP_ROWS:
            groups[-1].append((place, rows))
        else:
            groups.append([(place, rows)])
    return [group for group in groups if len(group) > 1]


def _group(runs: list[tuple[int, slice]], device: torch.device) -> _Group:
    span = slice(runs[0][1].start, runs[-1][1].stop)
    runs = sorted(runs, key=lambda run: run[0])  # so that places side by side are a view and not a copy
    owners = np.full(span.stop - span.start, -1, dtype=np.int64)
    for number, (_, rows) in enumerate(runs):
        owners[rows.start - span.start : rows.stop - span.start] = number
    places = np.array([place for place, _ in runs], dtype=np.int64)
    return _Group(len(runs), _run(places) or _indices(places, device), span, _indices(owners, device))


def _indices(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(device)


def _run(rows: np.ndarray) -> slice | None:
    """Ascending numbers without a gap, as a slice."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else None


class TorchKernel:
    """`LoraKernel` of torch operations.

    `multiplies`: whether torch multiplies matrices of a type here by instructions of its own; rows of other types are
    widened to float32. `sums_in_bags`: whether weighted sums of rows are faster here than batched matmuls of one row.
    """

    places_per_slab = 32
    mixes_dtypes = False

    def __init__(self, multiplies: Callable[[torch.dtype], bool], *, sums_in_bags: bool) -> None:
        self.multiplies = multiplies
        self.sums_in_bags = sums_in_bags

    def plan(self, rows: LoraRows, memory: DeviceMemory) -> TorchPlan:
        return TorchPlan(self, rows, memory)
