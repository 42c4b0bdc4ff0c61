"""Layouts and device memory hold whatever terms an adapter has, beside low-rank ones that kernels find as ever."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch

from manylora.kernels.cpu import cpu_multiplies
from manylora.kernels.interface import SiteGroup
from manylora.kernels.rows import group_rows
from manylora.kernels.torch_lora import TorchKernel
from manylora.lora.memory.device_memory import DeviceMemory
from manylora.lora.memory.layout import Layout
from manylora.lora.memory.packing import PackedAdapter
from manylora.lora.memory.slots import SlotBook
from manylora.lora.memory.terms import ITEM_BYTES, LowRankRoom, NumberFormat, aligned
from tests.lora.packed import random_packed

SHAPES = {0: (16, 24), 1: (16, 16), 2: (16, 40)}


@dataclass(frozen=True)
class VectorExtent:
    """`width` numbers at `at`."""

    at: int
    width: int

    @property
    def end(self) -> int:
        return aligned(self.at + self.width)

    def parts(self) -> Iterator[tuple[int, int]]:
        yield self.at, self.width


@dataclass(frozen=True)
class VectorRoom:
    """Of a term that is one vector, as a bias would be."""

    width: int

    def place(self, start: int, float_elements: int, *, has_scales: bool) -> VectorExtent:
        return VectorExtent(start, self.width)


def with_vectors(packed: PackedAdapter, vectors: dict[int, int]) -> PackedAdapter:
    """The adapter with a vector beside, or instead of, the low-rank terms: full of 1, 2 and so on, one for each."""
    rooms = sorted([*packed.layout.rooms, *((site, VectorRoom(width)) for site, width in vectors.items())], key=_site)
    layout = Layout(tuple(rooms), packed.layout.dtype)
    data = torch.zeros(layout.numel, dtype=packed.data.dtype)
    number = 0
    for site, extent in layout.placed:
        if isinstance(extent, VectorExtent):
            number += 1
            data[extent.at : extent.at + extent.width] = number
        else:
            for (start, size), (old, _) in zip(extent.parts(), packed.layout.low_rank[site].parts(), strict=True):
                data[start : start + size] = packed.data[old : old + size]
    return PackedAdapter(layout, packed.ranks, data)


def _site(entry: tuple[int, object]) -> int:
    return entry[0]


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_terms_of_any_class_share_a_buffer_without_overlap(dtype: NumberFormat) -> None:
    rooms = ((0, LowRankRoom(8, 16, 24)), (0, VectorRoom(24)), (2, VectorRoom(40)), (3, LowRankRoom(4, 16, 16)))
    layout = Layout(rooms, dtype, has_scales=dtype == "int8")
    spans = sorted((start, start + size) for start, size in layout.parts())
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert spans[-1][1] <= layout.numel
    assert list(layout.low_rank) == [0, 3]
    assert layout.sites == [0, 0, 2, 3]
    assert layout != Layout(rooms[:1], dtype, has_scales=dtype == "int8")


@pytest.mark.parametrize("places_per_slab", [1, 3])
def test_a_term_that_kernels_do_not_know_changes_nothing_for_those_they_do(places_per_slab: int) -> None:
    plain, _ = random_packed({0: 8, 1: 4}, SHAPES, seed=1)
    packed = with_vectors(plain, {1: 16, 2: 40})
    book = SlotBook(4, 2**20, places_per_slab)
    memory = DeviceMemory(len(SHAPES), 4, torch.device("cpu"))
    slots = []
    for adapter in (plain, packed):
        place = book.reserve(adapter.layout)
        assert place is not None
        if place.is_new_slab:
            memory.allocate(place, adapter.layout, book.places_in(place.slab))
        memory.fill(place, adapter)
        memory.publish(place, adapter)
        slots.append(place.slot)
    assert memory.touches[:, slots].tolist() == [[True, True], [True, True], [False, True]]
    assert memory.ranks[:, slots].tolist() == [[8, 8], [4, 4], [0, 0]]
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    rows = group_rows(np.array(slots, dtype=np.int32), memory.touches, torch.device("cpu"))
    assert rows is not None
    assert rows.touched == [True, True, True]
    plan = TorchKernel(cpu_multiplies, sums_in_bags=True).plan(rows, memory)
    for site, (_, width) in SHAPES.items():
        out = torch.zeros(2, width)
        plan.add_(out, x[:1].expand(2, -1).contiguous(), SiteGroup(site, (0, width), torch.tensor([0, width])))
        assert torch.equal(out[0], out[1])
        assert bool(out.any()) == (site != 2)
    slab, row = memory.locate(slots[1])
    extent = dict(slab.layout.placed)[2]
    (start, size), *_ = extent.parts()
    assert slab.data[start * slab.num_places + row * size :][:size].tolist() == [2.0] * 40
    memory.withdraw(slots[1])
    assert not memory.touches[:, slots[1]].any()
