"""Which adapter sits in which device slot, and what that costs in bytes. Bookkeeping only, no tensors.

Memory is taken in slabs: a slab holds a few places of one layout. Kernels that follow pointers use slabs of
one place, so nothing is ever wasted on another adapter's shape; the torch kernels multiply a whole slab at
once and use larger ones. The places of a slab that nobody uses are room for any other layout: `compact` takes them
from it.
"""

from collections.abc import Container
from dataclasses import dataclass, field

from manylora.lora.memory.layout import Layout


@dataclass(frozen=True, slots=True)
class Place:
    """A slot and where its buffer is: row `row` of slab `slab`. `is_new_slab`: the slab has yet to be allocated."""

    slot: int
    slab: int
    row: int
    is_new_slab: bool = False


@dataclass(slots=True)
class _Slab:
    layout: Layout
    place_bytes: int
    size_bytes: int
    free_rows: list[int]
    used: dict[int, int] = field(default_factory=dict)  # row -> slot


class SlotBook:
    """Hands out slots within a number of slots and a byte budget."""

    def __init__(self, num_slots: int, budget_bytes: int, places_per_slab: int = 1) -> None:
        self.num_slots = num_slots
        self.budget_bytes = budget_bytes
        self._places_per_slab = places_per_slab
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._places: dict[int, Place] = {}
        self._slabs: dict[int, _Slab] = {}
        self._next_slab = 0
        self.used_bytes = 0

    @property
    def num_used(self) -> int:
        return len(self._places)

    @property
    def free_bytes(self) -> int:
        """What the adapters in slots leave of the budget; part of it may be unused places of their slabs."""
        unused = sum(len(slab.free_rows) * slab.place_bytes for slab in self._slabs.values())
        return self.budget_bytes - self.used_bytes + unused

    def place_of(self, slot: int) -> Place:
        return self._places[slot]

    def layout_of(self, slot: int) -> Layout:
        return self._slabs[self._places[slot].slab].layout

    def can_ever_hold(self, layout: Layout) -> bool:
        return layout.size_bytes <= self.budget_bytes

    def reserve(self, layout: Layout) -> Place | None:
        """A slot for an adapter of this layout, or None when something must be evicted first."""
        if not self._free_slots:
            return None
        for slab_id, slab in self._slabs.items():
            if slab.free_rows and slab.layout == layout:
                return self._take(slab_id, slab, is_new=False)
        room = self.budget_bytes - self.used_bytes
        one = max(1, layout.size_bytes)
        count = min(self._places_per_slab, room // one)
        if count < 1:
            return None
        slab = _Slab(layout, one, count * one, list(range(count - 1, -1, -1)))
        slab_id = self._next_slab
        self._next_slab += 1
        self._slabs[slab_id] = slab
        self.used_bytes += slab.size_bytes
        return self._take(slab_id, slab, is_new=True)

    def places_in(self, slab_id: int) -> int:
        slab = self._slabs[slab_id]
        return len(slab.free_rows) + len(slab.used)

    def release(self, slot: int) -> int | None:
        """Give a slot back. Returns the slab to free when it was the last one in it."""
        place = self._places.pop(slot)
        slab = self._slabs[place.slab]
        del slab.used[place.row]
        slab.free_rows.append(place.row)
        self._free_slots.append(slot)
        if slab.used:
            return None
        del self._slabs[place.slab]
        self.used_bytes -= slab.size_bytes
        return place.slab

    def wasteful(self, layout: Layout, fixed: Container[int]) -> int | None:
        """The slab with the most unused bytes, where taking these away is what an adapter of `layout` lacks.

        `fixed`: slabs that have to stay as they are. None where slots are lacking, or unused places do not suffice.
        """
        unused = {
            slab_id: len(slab.free_rows) * slab.place_bytes
            for slab_id, slab in self._slabs.items()
            if slab.free_rows and slab_id not in fixed
        }
        room = self.budget_bytes - self.used_bytes + sum(unused.values())
        if not self._free_slots or not unused or room < layout.size_bytes:
            return None
        return max(unused, key=unused.__getitem__)

    def compacted(self, slab_id: int) -> list[Place]:
        """Where the adapters of a slab would be in a new one without unused places."""
        used = self._slabs[slab_id].used
        return [Place(used[row], self._next_slab, new, new == 0) for new, row in enumerate(sorted(used))]

    def compact(self, slab_id: int, places: list[Place]) -> None:
        """Note that the adapters are at `places` now, those that `compacted` gave; nothing was reserved in between."""
        old = self._slabs.pop(slab_id)
        size_bytes = len(places) * old.place_bytes
        self._slabs[places[0].slab] = _Slab(
            old.layout, old.place_bytes, size_bytes, [], {p.row: p.slot for p in places}
        )
        self._next_slab = places[0].slab + 1
        self.used_bytes += size_bytes - old.size_bytes
        self._places.update({place.slot: place for place in places})

    def _take(self, slab_id: int, slab: _Slab, *, is_new: bool) -> Place:
        row = slab.free_rows.pop()
        slot = self._free_slots.pop()
        place = Place(slot, slab_id, row, is_new)
        slab.used[row] = slot
        self._places[slot] = place
        return place

    def check_integrity(self) -> None:
        """Free and used add up, in slots, rows and bytes."""
        assert len(self._free_slots) + len(self._places) == self.num_slots
        assert not set(self._free_slots) & set(self._places)
        assert self.used_bytes == sum(s.size_bytes for s in self._slabs.values()) <= self.budget_bytes
        for slab_id, slab in self._slabs.items():
            assert slab.used, "an empty slab is freed at once"
            assert not set(slab.free_rows) & set(slab.used)
            assert (len(slab.free_rows) + len(slab.used)) * slab.place_bytes == slab.size_bytes
            for row, slot in slab.used.items():
                place = self._places[slot]
                assert (place.slab, place.row) == (slab_id, row)
        assert len(self._places) == sum(len(s.used) for s in self._slabs.values())
