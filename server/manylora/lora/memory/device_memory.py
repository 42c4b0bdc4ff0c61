"""The device tier's memory: slabs of flat buffers, and the tables by which kernels find an adapter's weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from manylora.lora.format.spec import Head
from manylora.lora.memory.layout import Layout
from manylora.lora.memory.packing import TORCH_DTYPES, PackedAdapter
from manylora.lora.memory.pages import zeros
from manylora.lora.memory.slots import Place
from manylora.lora.memory.terms import (
    DenseExtent,
    InputExtent,
    LowRankExtent,
    OutputExtent,
    PrefixExtent,
    TokenRowsExtent,
)

# How kernels are told an adapter's number format; `DType` of csrc/kernels.h has the same.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


class TableEntry(NamedTuple):
    """What kernels are told of what one slot adds at one site.

    `LoraEntry` of csrc/kernels.h has the same fields in this order.

    `a`, `b`: addresses of A [rank, in_features] and B [rank, out_features]; `rank` 0: there is none, and nothing
    else is read. `scales`: address of float32 [rank] by which A x is multiplied, or 0. `dtype`: one of
    `DTYPE_CODES`. A dense term is an A of out_features rows whose B is the identity: `b` 0.
    """

    a: int = 0
    b: int = 0
    rank: int = 0
    scales: int = 0
    dtype: int = 0
    in_features: int = 0
    out_features: int = 0


class OutputEntry(NamedTuple):
    """What kernels are told of how one slot changes the output, or the input, of one site.

    `OutputEntry` of csrc/kernels.h has the same fields in this order.

    `scale`, `shift`: addresses of float32 [out_features], or 0 for 1 and for 0; `out_features` 0: nothing is changed.
    """

    scale: int = 0
    shift: int = 0
    out_features: int = 0


TABLE_FIELDS = len(TableEntry._fields)
OUTPUT_FIELDS = len(OutputEntry._fields)
# Memory for so many elements of a type, on the device.
Allocate = Callable[[int, torch.dtype], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Slab:
    """`num_places` adapters of one layout, matrix by matrix: first every place's A of the first module, then every B.

    So the stack of one matrix over all places is contiguous, which batched matmuls need if they are not to copy it.
    `data` has one dimension of num_places * layout.numel elements. `views`: stacks by offset, as kernels ask for the
    same ones in every step. `finite`: places whose adapter is known to hold no NaN and no infinity; none in a slab
    of one place, which has no neighbours to spare, and whose loads are to be one copy.
    """

    layout: Layout
    num_places: int
    data: torch.Tensor
    views: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)
    finite: set[int] = field(default_factory=set)
    ids: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict, repr=False)

    def stack_a(self, extent: LowRankExtent) -> torch.Tensor:
        """A of every place: [places, padded rank, in_features], a view."""
        return self._stack(extent.a, extent.padded, extent.in_features)

    def stack_b(self, extent: LowRankExtent) -> torch.Tensor:
        """B of every place: [places, padded rank, out_features], a view."""
        return self._stack(extent.b, extent.padded, extent.out_features)

    def stack_scales(self, extent: LowRankExtent) -> torch.Tensor:
        """The scales of every place, in a layout that has them: [places, padded rank] float32, a view."""
        return self._stack(extent.scales, extent.padded, self.layout.float_elements).view(torch.float32)[..., 0]

    def dense(self, extent: DenseExtent, row: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One place's D as stored [rows, columns], and its rows' scales float32 [rows] in a layout that has them."""
        matrix = self._room(extent.matrix, extent.rows * extent.columns, row).view(extent.rows, extent.columns)
        size = extent.rows * extent.scale_elements
        return matrix, self._room(extent.scales, size, row).view(torch.float32) if size else None

    def vector(self, at: int, extent: InputExtent | OutputExtent, row: int) -> torch.Tensor:
        """One of a place's vectors, `scale` or `shift`: float32 [width]."""
        return self._room(at, extent.width * extent.float_elements, row).view(torch.float32)

    def token_rows(self, extent: TokenRowsExtent, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Some tokens' ids, ascending int64 [n], and what one place adds to their rows, float32 [n, width]."""
        ids = self.ids.get(extent.ids)
        if ids is None:
            ids = self.ids[extent.ids] = torch.tensor(extent.ids, device=self.data.device)
        room = self._room(extent.rows, len(extent.ids) * extent.width * extent.float_elements, row)
        return ids, room.view(torch.float32).view(len(extent.ids), extent.width)

    def floats(self, at: int, width: int, extent: PrefixExtent, row: int) -> torch.Tensor:
        """One of a place's matrices of virtual tokens: float32 [count, width]."""
        room = self._room(at, extent.count * width * extent.float_elements, row)
        return room.view(torch.float32).view(extent.count, width)

    def _stack(self, offset: int, rows: int, columns: int) -> torch.Tensor:
        view = self.views.get(offset)
        if view is None:
            start = offset * self.num_places
            view = self.data[start : start + self.num_places * rows * columns].view(self.num_places, rows, columns)
            self.views[offset] = view
        return view

    def fill(self, row: int, packed: PackedAdapter) -> None:
        """Copy one adapter into its place."""
        if self.num_places == 1:
            self.data.copy_(packed.data)
            return
        self.finite.discard(row)
        if not self.layout.has_scales and bool(packed.data.isfinite().all()):
            self.finite.add(row)
        for offset, size in self.layout.parts():
            self._room(offset, size, row).copy_(packed.data[offset : offset + size])

    def _room(self, offset: int, size: int, row: int) -> torch.Tensor:
        """One place's part of a stack of `size` elements each."""
        start = offset * self.num_places + row * size
        return self.data[start : start + size]

    def copy_place(self, row: int, source: "Slab", source_row: int) -> None:
        """Take over one adapter of another slab of the same layout."""
        for offset, size in self.layout.parts():
            self._room(offset, size, row).copy_(source._room(offset, size, source_row))
        if source_row in source.finite and self.num_places > 1:
            self.finite.add(row)


class Changes:
    """How slots change what goes into the sites, or what comes out of them.

    `entries` int64 [sites, slots, OUTPUT_FIELDS] on the device, an `OutputEntry` each; `flags` bool [sites, slots] on
    the host: whether there is one.
    """

    def __init__(self, num_sites: int, num_slots: int, device: torch.device) -> None:
        self.entries = torch.zeros(num_sites, num_slots, OUTPUT_FIELDS, dtype=torch.int64, device=device)
        self.flags = np.zeros((num_sites, num_slots), dtype=np.bool_)

    def publish(self, slot: int, entries: Mapping[int, OutputEntry]) -> None:
        """Let kernels find a slot's, by site."""
        if entries:
            rows = np.zeros((len(self.flags), OUTPUT_FIELDS), dtype=np.int64)
            rows[list(entries)] = list(entries.values())
            self.entries[:, slot] = torch.from_numpy(rows).to(self.entries.device)
            self.flags[list(entries), slot] = True

    def withdraw(self, slot: int) -> None:
        """Nothing is changed by this slot."""
        if self.flags[:, slot].any():
            self.entries[:, slot] = 0
            self.flags[:, slot] = False


def _output_entry(slab: Slab, extent: OutputExtent, row: int) -> OutputEntry:
    scale, shift = (0 if at is None else slab.vector(at, extent, row).data_ptr() for at in (extent.scale, extent.shift))
    return OutputEntry(scale, shift, extent.width)


@dataclass(frozen=True, slots=True)
class HeldPrefix:
    """Virtual tokens in a slot. `embeddings` float32 [count, hidden], or None; `past` float32 [count, past width].

    `num_ready`: of how many, from the first on, `past` holds what layers make of them.
    """

    embeddings: torch.Tensor | None
    past: torch.Tensor
    num_ready: int
    slab: Slab


class DeviceMemory:
    """Slabs by number, and per site and slot where the weights are.

    `touches` bool [sites, slots] on the host: whether the slot's adapter has any term at the site.
    `tables` int64 [sites, slots, TABLE_FIELDS] on the device, a `TableEntry` for each low-rank or dense term, and
    `ranks` int32 [sites, slots] on the host, the low-rank ones' ranks, `has_dense` bool [sites, slots] the sites of
    whole matrices, `formats` int32 [slots] the number of each slot's type (`DTYPE_CODES`).
    `inputs`, `outputs`: how the slots change what goes into each site and what comes out.
    `with_token_rows`: slots that add to the rows of some tokens; `vocabularies`: for how many tokens a slot has rows,
    where these are not as many as the base's. `heads`: what the scores of a slot's adapter mean, where it has some.
    `named`: slots that the step under way reads; whoever runs it says so. `allocate`, `fill` and `publish` may run
    beside a step, since it does not name the slot yet, and `withdraw`, since it does not any more. `move` may too:
    where a slot's weights are is read as one value (`locate`), and who has read it keeps the old slab, in which they
    stay what they were.
    """

    def __init__(self, num_sites: int, num_slots: int, device: torch.device, allocate: Allocate = zeros) -> None:
        self.device = device
        self._allocate = allocate
        self.tables = torch.zeros(num_sites, num_slots, TABLE_FIELDS, dtype=torch.int64, device=device)
        self.ranks = np.zeros((num_sites, num_slots), dtype=np.int32)
        self.touches = np.zeros((num_sites, num_slots), dtype=np.bool_)
        self.has_dense = np.zeros((num_sites, num_slots), dtype=np.bool_)
        self.formats = np.zeros(num_slots, dtype=np.int32)
        self.inputs = Changes(num_sites, num_slots, device)
        self.outputs = Changes(num_sites, num_slots, device)
        self.slabs: dict[int, Slab] = {}
        self.places: dict[int, Place] = {}
        self._located: dict[int, tuple[Slab, int]] = {}
        self.heads: dict[int, Head] = {}
        self.with_token_rows: set[int] = set()
        self.vocabularies: dict[int, int] = {}
        self.named: tuple[int, ...] = ()
        # How many of a slot's virtual tokens were computed, and where: it may have moved since.
        self._ready: dict[int, tuple[Slab, int]] = {}

    def allocate(self, place: Place, layout: Layout, num_places: int) -> None:
        """Make the slab that `place` is the first of. On a CPU untouched rows cost no memory."""
        data = self._allocate(num_places * layout.numel, TORCH_DTYPES[layout.dtype])
        self.slabs[place.slab] = Slab(layout, num_places, data)

    def fill(self, place: Place, packed: PackedAdapter) -> None:
        self.slabs[place.slab].fill(place.row, packed)

    def publish(self, place: Place, packed: PackedAdapter) -> None:
        """Let kernels find the adapter at its slot."""
        assert place.slot not in self.named, "a step reads what is written"
        ranks = np.zeros(self.ranks.shape[0], dtype=np.int32)
        ranks[list(packed.ranks)] = list(packed.ranks.values())
        self._point(place, ranks)
        self.ranks[:, place.slot] = ranks
        self.touches[packed.layout.sites, place.slot] = True
        self.has_dense[list(packed.layout.dense), place.slot] = True
        self.formats[place.slot] = DTYPE_CODES[TORCH_DTYPES[packed.layout.dtype]]
        if packed.num_tokens is not None:
            self.vocabularies[place.slot] = packed.num_tokens
        if packed.layout.token_rows:
            self.with_token_rows.add(place.slot)
        if packed.head is not None:
            self.heads[place.slot] = packed.head

    def _point(self, place: Place, ranks: np.ndarray) -> None:
        slab = self.slabs[place.slab]
        rows = np.zeros((self.tables.shape[0], TABLE_FIELDS), dtype=np.int64)
        code = DTYPE_CODES[slab.data.dtype]
        for site, extent in slab.layout.low_rank.items():
            a, b = slab.stack_a(extent)[place.row], slab.stack_b(extent)[place.row]
            scales = slab.stack_scales(extent)[place.row].data_ptr() if slab.layout.has_scales else 0
            rows[site] = TableEntry(
                a.data_ptr(), b.data_ptr(), int(ranks[site]), scales, code, extent.in_features, extent.out_features
            )
        for site, dense in slab.layout.dense.items():
            matrix, factors = slab.dense(dense, place.row)
            at = factors.data_ptr() if factors is not None else 0
            rows[site] = TableEntry(matrix.data_ptr(), 0, dense.rows, at, code, dense.columns, dense.rows)
        self.tables[:, place.slot] = torch.from_numpy(rows).to(self.device)
        inputs = {
            site: OutputEntry(slab.vector(e.scale, e, place.row).data_ptr(), 0, e.width)
            for site, e in slab.layout.inputs.items()
        }
        self.inputs.publish(place.slot, inputs)
        self.outputs.publish(
            place.slot, {site: _output_entry(slab, e, place.row) for site, e in slab.layout.outputs.items()}
        )
        self._located[place.slot] = slab, place.row
        self.places[place.slot] = place

    def move(self, places: list[Place]) -> None:
        """Bring the adapters of these slots, all that their slab has, to a new slab that holds no more than them.

        Both are there for a moment. Where there is no memory for that, nothing has changed.
        """
        old = self.places[places[0].slot].slab
        source = self.slabs[old]
        self.allocate(places[0], source.layout, len(places))
        for place in places:
            self.slabs[place.slab].copy_place(place.row, source, self.places[place.slot].row)
        for place in places:
            self._point(place, self.ranks[:, place.slot])
        self.free(old)

    def withdraw(self, slot: int) -> None:
        """Make a slot empty for the kernels."""
        assert slot not in self.named, "a step reads what is taken away"
        self.tables[:, slot] = 0
        self.ranks[:, slot] = 0
        self.touches[:, slot] = False
        self.has_dense[:, slot] = False
        self.inputs.withdraw(slot)
        self.outputs.withdraw(slot)
        self._ready.pop(slot, None)
        self.places.pop(slot, None)
        self._located.pop(slot, None)
        self.heads.pop(slot, None)
        self.with_token_rows.discard(slot)
        self.vocabularies.pop(slot, None)

    def free(self, slab: int) -> None:
        self.slabs.pop(slab, None)

    def matrices(self, slot: int, site: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A and B of one slot, true rank only: [r, in] (an embedding's: [vocab, r]) and [r, out]; None if untouched.

        Numbers are as they are stored, but for scales, which are multiplied into A.
        """
        rank = int(self.ranks[site, slot])
        if not rank:
            return None
        slab, row, extent = self._find(slot, site)
        a, b = slab.stack_a(extent)[row, :rank], slab.stack_b(extent)[row, :rank]
        return (a * slab.stack_scales(extent)[row, :rank, None] if slab.layout.has_scales else a), b

    def embedding_matrices(
        self, slot: int, site: int, token_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """An embedding's rows of A for tokens [T], as [T, r], and its B [r, hidden]; None if untouched."""
        rank = int(self.ranks[site, slot])
        if not rank:
            return None
        slab, row, extent = self._find(slot, site)
        room = slab.stack_a(extent)[row].view(extent.in_features, extent.padded)
        a, b = room[token_ids, :rank], slab.stack_b(extent)[row, :rank]
        return (a * slab.stack_scales(extent)[row, :rank] if slab.layout.has_scales else a), b

    def experts(
        self, slot: int, site: int, num_experts: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
        """A and B of each of a layer's experts, as stored: [experts, r, in] and [experts, r, out]; None if untouched.

        And by what A x is multiplied, float32 [experts, r], in a layout that has scales.
        """
        rank = int(self.ranks[site, slot])
        if not rank:
            return None
        slab, row, extent = self._find(slot, site)
        own = rank // num_experts
        a = slab.stack_a(extent)[row, :rank].view(num_experts, own, extent.in_features)
        b = slab.stack_b(extent)[row, :rank].view(num_experts, own, extent.out_features)
        scales = slab.stack_scales(extent)[row, :rank].reshape(num_experts, own) if slab.layout.has_scales else None
        return a, b, scales

    def dense(self, slot: int, site: int) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """D of one slot as it is stored, [out, in] (an embedding's: [vocab, hidden]), and its rows' scales or None.

        None if the slot has no dense term at the site.
        """
        slab, row = self._located[slot]
        extent = slab.layout.dense.get(site)
        return None if extent is None else slab.dense(extent, row)

    def token_rows(self, slot: int, site: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Ids [n], ascending, of the tokens to whose rows one slot adds, and what: float32 [n, hidden]; or None."""
        slab, row = self._located[slot]
        extent = slab.layout.token_rows.get(site)
        return None if extent is None else slab.token_rows(extent, row)

    def input(self, slot: int, site: int) -> torch.Tensor | None:
        """What one slot multiplies a site's input by: float32 [in_features], or None."""
        slab, row = self._located[slot]
        extent = slab.layout.inputs.get(site)
        return None if extent is None else slab.vector(extent.scale, extent, row)

    def output(self, slot: int, site: int) -> tuple[torch.Tensor | None, torch.Tensor | None] | None:
        """What one slot multiplies a site's output by, and what it adds: float32 [out_features], or None."""
        slab, row = self._located[slot]
        extent = slab.layout.outputs.get(site)
        if extent is None:
            return None
        scale, shift = (None if at is None else slab.vector(at, extent, row) for at in (extent.scale, extent.shift))
        return scale, shift

    def prefix(self, slot: int) -> "HeldPrefix":
        """The virtual tokens of one slot, which has some."""
        slab, row = self._located[slot]
        extent = slab.layout.prefix
        assert extent is not None, "the slot's adapter has virtual tokens"
        embeddings = None if extent.embeddings is None else slab.floats(extent.embeddings, extent.width, extent, row)
        past = slab.floats(extent.past, extent.past_width, extent, row)
        where, num_ready = self._ready.get(slot, (slab, 0))
        if embeddings is None:
            num_ready = len(past)
        return HeldPrefix(embeddings, past, num_ready if where is slab else 0, slab)

    def keep_prefix(self, slot: int, prefix: "HeldPrefix", num_ready: int) -> None:
        """What layers make of the first `num_ready` virtual tokens was written where it is kept."""
        self._ready[slot] = prefix.slab, num_ready

    def num_kept(self, slot: int) -> int:
        """How many of a slot's virtual tokens, from the first on, need not be computed."""
        return self.prefix(slot).num_ready

    def locate(self, slot: int) -> tuple[Slab, int]:
        """The slab and the place in it where a published adapter is."""
        return self._located[slot]

    def _find(self, slot: int, site: int) -> tuple[Slab, int, LowRankExtent]:
        slab, row = self._located[slot]
        return slab, row, slab.layout.low_rank[site]
