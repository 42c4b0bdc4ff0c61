import pytest
import torch

from manylora.kernels.reference import LowRank
from manylora.lora.memory.device_memory import DTYPE_CODES, TABLE_FIELDS, DeviceMemory, TableEntry
from manylora.lora.memory.packing import PackedAdapter
from manylora.lora.memory.slots import Place, SlotBook
from tests.lora.packed import random_packed

SHAPES = {0: (40, 30), 1: (7, 11), 2: (40, 24)}
CPU = torch.device("cpu")


class Device:
    """A book and its memory, used as the tiers use them."""

    def __init__(self, places_per_slab: int, num_slots: int = 8) -> None:
        self.book = SlotBook(num_slots, 2**24, places_per_slab)
        self.memory = DeviceMemory(len(SHAPES), num_slots, CPU)

    def bring(self, packed: PackedAdapter) -> Place:
        place = self.book.reserve(packed.layout)
        assert place is not None
        if place.is_new_slab:
            self.memory.allocate(place, packed.layout, self.book.places_in(place.slab))
        self.memory.fill(place, packed)
        self.memory.publish(place, packed)
        return place

    def evict(self, slot: int) -> None:
        self.memory.withdraw(slot)
        slab = self.book.release(slot)
        if slab is not None:
            self.memory.free(slab)

    def assert_holds(self, slot: int, pairs: dict[int, LowRank]) -> None:
        for site in SHAPES:
            found = self.memory.matrices(slot, site)
            if site not in pairs:
                assert found is None
                continue
            assert found is not None
            assert torch.equal(found[0], pairs[site].a)
            assert torch.equal(found[1], pairs[site].b)


@pytest.mark.parametrize("places_per_slab", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_what_is_brought_in_is_read_back_bit_by_bit(places_per_slab: int, dtype: torch.dtype) -> None:
    device = Device(places_per_slab)
    ranks = [{0: 3, 1: 8}, {0: 3, 1: 5}, {2: 16}, {0: 2, 1: 7, 2: 1}, {0: 4, 1: 8}, {}]
    made = [random_packed(r, SHAPES, seed=i, dtype=dtype) for i, r in enumerate(ranks)]
    places = [device.bring(packed) for packed, _ in made]
    for place, (_, pairs) in zip(places, made, strict=True):
        device.assert_holds(place.slot, pairs)
        assert device.memory.ranks[:, place.slot].tolist() == [
            len(pairs[s].a) if s in pairs else 0 for s in sorted(SHAPES)
        ]


@pytest.mark.parametrize("places_per_slab", [1, 3])
def test_tables_hold_the_addresses_of_contiguous_matrices(places_per_slab: int) -> None:
    device = Device(places_per_slab)
    for seed in range(3):
        packed, pairs = random_packed({0: 3, 2: 8}, SHAPES, seed=seed)
        slot = device.bring(packed).slot
        for site in pairs:
            found = device.memory.matrices(slot, site)
            assert found is not None
            assert all(matrix.is_contiguous() for matrix in found)
            a, b = found
            expected = TableEntry(a.data_ptr(), b.data_ptr(), len(a), 0, DTYPE_CODES[a.dtype], a.shape[1], b.shape[1])
            assert device.memory.tables[site, slot].tolist() == list(expected)
        assert device.memory.tables[1, slot].tolist() == [0] * TABLE_FIELDS


@pytest.mark.parametrize("places_per_slab", [1, 3])
def test_a_withdrawn_slot_is_empty_and_its_neighbours_stay(places_per_slab: int) -> None:
    device = Device(places_per_slab)
    made = [random_packed({0: 3, 1: 8}, SHAPES, seed=i) for i in range(3)]
    places = [device.bring(packed) for packed, _ in made]
    device.evict(places[1].slot)
    assert not device.memory.tables[:, places[1].slot].any()
    device.assert_holds(places[1].slot, {})
    for i in (0, 2):
        device.assert_holds(places[i].slot, made[i][1])


def test_a_used_place_holds_nothing_of_the_adapter_before() -> None:
    device = Device(3)
    keeper = device.bring(random_packed({0: 8}, SHAPES)[0])
    old = device.bring(random_packed({0: 8}, SHAPES, seed=1)[0])
    device.evict(old.slot)
    packed, pairs = random_packed({0: 5}, SHAPES, seed=2)
    new = device.bring(packed)
    assert (new.slab, new.row) == (old.slab, old.row)
    device.assert_holds(new.slot, pairs)
    padding = device.memory.slabs[new.slab].stack_b(packed.layout.low_rank[0])[new.row, 5:]
    assert not padding.any()
    device.evict(keeper.slot)


def test_only_slabs_of_many_places_are_searched_for_numbers_that_are_not_finite(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed, _ = random_packed({0: 8}, SHAPES)
    spoiled = PackedAdapter(packed.layout, packed.ranks, torch.full_like(packed.data, float("nan")))
    device = Device(3)
    places = [device.bring(each) for each in (packed, spoiled, packed)]
    slab = device.memory.slabs[places[0].slab]
    assert slab.finite == {places[0].row, places[2].row}
    device.memory.fill(places[0], spoiled)
    assert slab.finite == {places[2].row}

    def fail(numbers: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a whole adapter was read for nothing")

    monkeypatch.setattr(torch.Tensor, "isfinite", fail)
    alone = Device(1)
    place = alone.bring(packed)
    assert not alone.memory.slabs[place.slab].finite


def test_memory_is_freed_with_the_last_adapter_of_a_slab() -> None:
    device = Device(2)
    places = [device.bring(random_packed({0: 8}, SHAPES, seed=i)[0]) for i in range(3)]
    for place in places:
        device.evict(place.slot)
    assert not device.memory.slabs
    assert not device.memory.places
    assert not device.memory.ranks.any()


@pytest.mark.parametrize("places_per_slab", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_an_embeddings_matrices_are_read_by_token(places_per_slab: int, dtype: torch.dtype) -> None:
    device = Device(places_per_slab)
    tokens = torch.tensor([3, 0, 39, 3])
    for seed in range(2):
        packed, pairs = random_packed({0: 3}, SHAPES, seed=seed, dtype=dtype, embeddings=frozenset({0}))
        found = device.memory.embedding_matrices(device.bring(packed).slot, 0, tokens)
        assert found is not None
        assert torch.equal(found[0], pairs[0].a.T[tokens])
        assert torch.equal(found[1], pairs[0].b)
        assert device.memory.embedding_matrices(7, 0, tokens) is None


@pytest.mark.parametrize("places_per_slab", [1, 3])
def test_tables_hold_the_addresses_of_the_scales_of_int8_adapters(places_per_slab: int) -> None:
    device = Device(places_per_slab)
    for seed in range(3):
        packed, _ = random_packed({0: 3, 2: 8}, SHAPES, seed=seed, dtype=torch.int8)
        place = device.bring(packed)
        for site in (0, 2):
            scales = device.memory.slabs[place.slab].stack_scales(packed.layout.low_rank[site])[place.row]
            assert scales.is_contiguous()
            entry = TableEntry(*device.memory.tables[site, place.slot].tolist())
            assert (entry.scales, entry.dtype) == (scales.data_ptr(), DTYPE_CODES[torch.int8])
            assert scales[: packed.ranks[site]].all()
        assert not device.memory.tables[1, place.slot].any()
