"""The device tier: who has a place, who may lose it, and what that does to the device's memory."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final

from manylora.errors import AdapterLoadFailed, Conflict, ManyloraError
from manylora.identity import AdapterRef, Tier
from manylora.lora.format.spec import Adapter
from manylora.lora.memory.device_memory import DeviceMemory
from manylora.lora.memory.eviction import GreedyDualSizeFrequency
from manylora.lora.memory.layout import Layout
from manylora.lora.memory.packing import PackedAdapter
from manylora.lora.memory.slots import Place, SlotBook

# Bringing an adapter back from disk takes about this many times as long as from host memory: it is parsed and packed.
DISK_COST = 8.0
_ENOUGH: Final = 2**31  # chances, for as many as try


class State(Enum):
    """Where an adapter is on its way to the device.

                                        ┌───────────── no place ────────────┐
                                        ▼                                   │
        AWAY ── asked for ──▶ WAITING ── tried ──▶ QUEUED ── thread ──▶ READING ── place ──▶ FILLING
          ▲                                                                                     │
          └──────────── evicted ──── RESIDENT ◀── taken ── CLAIMED ◀────────────────────────────┘

    AWAY → WAITING: a request asks for it, or a pin
    WAITING → QUEUED: it is tried, since it may find a place, or host memory has room to read it ahead
    WAITING → AWAY: nobody waits for it any more
    QUEUED → READING: a loader thread has it
    QUEUED → AWAY: nobody waits for it any more
    READING → FILLING: it has a place, to which the thread copies it
    READING → WAITING: it found no place
    READING → AWAY: it found no place, or could not be read, and nobody waits for it
    FILLING → CLAIMED: kernels find it, and it is kept for a request that waits
    FILLING → RESIDENT: kernels find it, and it is pinned, or nobody waits for it any more
    FILLING → AWAY: its place could not be filled
    CLAIMED → RESIDENT: the request has taken it, or waits no more
    CLAIMED → AWAY: evicted for one that was in more of a hurry
    RESIDENT → AWAY: evicted, or forgotten
    """

    AWAY = auto()
    WAITING = auto()
    QUEUED = auto()
    READING = auto()
    FILLING = auto()
    CLAIMED = auto()
    RESIDENT = auto()


NEXT: Final[Mapping[State, frozenset[State]]] = {
    State.AWAY: frozenset({State.WAITING}),
    State.WAITING: frozenset({State.QUEUED, State.AWAY}),
    State.QUEUED: frozenset({State.READING, State.AWAY}),
    State.READING: frozenset({State.FILLING, State.WAITING, State.AWAY}),
    State.FILLING: frozenset({State.CLAIMED, State.RESIDENT, State.AWAY}),
    State.CLAIMED: frozenset({State.RESIDENT, State.AWAY}),
    State.RESIDENT: frozenset({State.AWAY}),
}


@dataclass(slots=True)
class Entry:
    """One adapter that is on the device, on its way there, waited for, or pinned."""

    ref: AdapterRef
    state: State = State.AWAY
    offered: Adapter | None = None  # already read: to be taken in place of its files
    place: Place | None = None  # from FILLING on
    is_pinned: bool = False
    is_gathered: bool = False  # one of those that are brought together: once resident it has a user more for that
    is_forgotten: bool = False
    users: int = 0
    error: ManyloraError | None = None
    size_bytes: int = 0  # on the device; 0 until it was read once

    def to(self, state: State) -> None:
        assert state in NEXT[self.state], f"{self.ref.label} goes from {self.state.name} to {state.name}"
        self.state = state

    def unclaim(self) -> None:
        """Nobody's claim keeps it any more, if one did."""
        if self.state is State.CLAIMED:
            self.to(State.RESIDENT)

    @property
    def is_resident(self) -> bool:
        """Kernels find it at its slot."""
        return self.state in (State.CLAIMED, State.RESIDENT)

    @property
    def is_loading(self) -> bool:
        """A loader thread has it, or will."""
        return self.state in (State.QUEUED, State.READING, State.FILLING)

    @property
    def is_idle(self) -> bool:
        """Whether the adapter's place could be taken."""
        return self.is_resident and not self.users and not self.is_pinned

    def check_integrity(self) -> None:
        """Whoever is used or kept for somebody has a place."""
        assert self.users >= 0
        assert not self.users or self.state is State.RESIDENT
        assert not self.is_resident or self.place is not None
        assert self.state is not State.CLAIMED or not self.is_pinned


def no_room_for(entry: Entry, others: str = "") -> AdapterLoadFailed:
    """The pinned adapters, and `others`, take what it would need, and will for as long as it waits."""
    return AdapterLoadFailed(
        f"The pinned adapters{others} leave no room for this one ({entry.size_bytes} bytes): "
        "unpin one, or raise --adapter-memory or --max-slots."
    )


class TierEvents:
    """What the tiers tell the metrics. The base class says nothing."""

    def on_load(self, ref: AdapterRef, tier: Tier, seconds: float) -> None:
        """The adapter went up from `tier`: from disk to host memory, or from there to the device."""

    def on_failure(self, ref: AdapterRef) -> None:
        """The adapter was asked for and could not be brought to the device."""

    def on_eviction(self, ref: AdapterRef, tier: Tier) -> None:
        """The adapter left `tier` to make room."""

    def on_enter(self, ref: AdapterRef) -> None:
        """A device slot is the adapter's own from now on."""

    def on_leave(self, ref: AdapterRef) -> None:
        """The adapter's device slot is free again."""


class DeviceTier:
    """Places on the device. Whoever calls holds the tiers' lock (`is_held`), but for `fill`."""

    def __init__(
        self,
        book: SlotBook,
        memory: DeviceMemory,
        events: TierEvents,
        on_evicted: Callable[[Entry], None],
        is_held: Callable[[], bool],
    ) -> None:
        self.book = book
        self.memory = memory
        self._events = events
        self._on_evicted = on_evicted
        self._is_held = is_held
        self._policy: GreedyDualSizeFrequency[str] = GreedyDualSizeFrequency()
        self._placed: dict[str, Entry] = {}
        self._evictable: dict[str, Entry] = {}
        self._claimed: dict[str, Entry] = {}  # idle, and kept for a request that waits in the queue

    def entries(self) -> list[Entry]:
        return list(self._placed.values())

    def rows(self) -> list[dict[str, Any]]:
        """One per adapter that kernels find."""
        return [
            {
                "slot": e.place.slot,
                "id": e.ref.id,
                "tenant": e.ref.tenant,
                "name": e.ref.name,
                "version": e.ref.version,
                "size_bytes": e.size_bytes,
                "users": e.users,
                "pinned": e.is_pinned,
            }
            for e in self._placed.values()
            if e.is_resident and e.place is not None
        ]

    def refile(self, entry: Entry) -> bool:
        """File an adapter anew whose users, pin or claim have changed. True if it may be evicted only from now on."""
        assert self._is_held()
        key = entry.ref.id
        was_evictable = self._evictable.pop(key, None) is not None
        self._claimed.pop(key, None)
        if not entry.is_idle:
            return False
        is_claimed = entry.state is State.CLAIMED
        (self._claimed if is_claimed else self._evictable)[key] = entry
        return not is_claimed and not was_evictable

    def count_use(self, entry: Entry, *, is_on_host: bool) -> None:
        cost = entry.size_bytes * (1.0 if is_on_host else DISK_COST)
        self._policy.on_use(entry.ref.id, entry.size_bytes, cost)

    def num_chances(self, entry: Entry, typical_bytes: int, *, is_hurried: bool) -> int:
        """How many adapters like this one might find a place now. A guess: of unread ones the size is not known.

        Where waiting is for ever, whoever tries hears of it and takes no chance from anybody.
        """
        size = max(1, entry.size_bytes or typical_bytes)
        free = min(self.book.num_slots - self.book.num_used, self.book.free_bytes // size)
        chances = free + len(self._victims(is_hurried=is_hurried))
        return chances if chances or not self.keeps_all(entry) else _ENOUGH

    def _victims(self, *, is_hurried: bool) -> Mapping[str, Entry]:
        return self._evictable or (self._claimed if is_hurried else {})

    def make_room(self, entry: Entry, packed: PackedAdapter, *, is_hurried: bool) -> bool:
        """Give `entry` a place, evicting idle adapters as needed; False while all that could leave is in use.

        One that `is_hurried` takes those kept for other requests, too. Raises AdapterLoadFailed where it never can have
        one: it is larger than the budget, or than what the pinned ones leave of it.
        """
        assert self._is_held()
        if not self.book.can_ever_hold(packed.layout):
            raise AdapterLoadFailed(
                f"The adapter needs {packed.size_bytes} bytes on the device and the whole budget is "
                f"{self.book.budget_bytes}: raise --adapter-memory."
            )
        place = self._reserve(packed.layout)
        while place is None:
            victim = self._policy.victim(self._victims(is_hurried=is_hurried))
            if victim is None:
                if all(e.is_pinned and e.is_resident for e in self._placed.values()):
                    raise no_room_for(entry)
                return False
            evicted = self._placed[victim]
            self.evict(evicted)
            self._events.on_eviction(evicted.ref, "device")
            self._on_evicted(evicted)
            place = self._reserve(packed.layout)
        entry.place = place
        self._placed[entry.ref.id] = entry
        self._events.on_enter(entry.ref)
        with self._given_back_on_error(entry):
            if place.is_new_slab:
                self.memory.allocate(place, packed.layout, self.book.places_in(place.slab))
        entry.to(State.FILLING)
        return True

    def _reserve(self, layout: Layout) -> Place | None:
        """A place, where bytes are free: also those that slabs of other layouts have and do not use."""
        place = self.book.reserve(layout)
        while place is None:
            # Who is being filled stays where it is: another thread writes there.
            fixed = {e.place.slab for e in self._placed.values() if e.place is not None and not e.is_resident}
            slab = self.book.wasteful(layout, fixed)
            if slab is None:
                return None
            places = self.book.compacted(slab)
            self.memory.move(places)
            self.book.compact(slab, places)
            entries = {e.place.slot: e for e in self._placed.values() if e.place is not None}
            for moved in places:
                entries[moved.slot].place = moved
            place = self.book.reserve(layout)
        return place

    @property
    def has_unused_places(self) -> bool:
        """Whether slabs hold more than their adapters take."""
        return self.book.free_bytes > self.book.budget_bytes - self.book.used_bytes

    def keeps_all(self, entry: Entry) -> bool:
        """Whether all that has a place stays for as long as `entry` waits: it is pinned, or gathered with this one."""
        kept = (e.is_resident and (e.is_pinned or (entry.is_gathered and e.is_gathered)) for e in self._placed.values())
        return bool(self._placed) and all(kept)

    def check_pins(self, pinned: list[Entry], entry: Entry) -> None:
        """Whether `entry` may be pinned beside `pinned`. Raises Conflict."""
        size = sum(each.size_bytes for each in (*pinned, entry))
        if len(pinned) + 1 >= self.book.num_slots or size >= self.book.budget_bytes:
            raise Conflict(
                "With one more pinned adapter there would be no room on the device for any other. Unpin one, or raise "
                "--max-slots and --adapter-memory."
            )

    def fill(self, entry: Entry, packed: PackedAdapter) -> None:
        """Copy the weights to its place. Runs beside everything else: nobody knows the place yet."""
        assert not self._is_held()
        assert entry.state is State.FILLING
        assert entry.place is not None
        self.memory.fill(entry.place, packed)

    def publish(self, entry: Entry, packed: PackedAdapter, *, is_claimed: bool) -> None:
        """Let kernels find it. With `is_claimed` it is kept for a request that waits."""
        assert self._is_held()
        assert entry.place is not None
        self.memory.publish(entry.place, packed)
        entry.to(State.CLAIMED if is_claimed else State.RESIDENT)
        self.refile(entry)

    def evict(self, entry: Entry) -> None:
        """Take it off the device, if it is there."""
        assert self._is_held()
        if entry.place is None or not entry.is_resident:
            return
        entry.to(State.AWAY)
        self.refile(entry)
        self.memory.withdraw(entry.place.slot)
        self.give_back(entry)
        self._policy.on_remove(entry.ref.id)

    def give_back(self, entry: Entry) -> None:
        """Free the adapter's place."""
        assert self._is_held()
        assert entry.place is not None
        slot, entry.place = entry.place.slot, None
        del self._placed[entry.ref.id]
        self._events.on_leave(entry.ref)
        slab = self.book.release(slot)
        if slab is not None:
            self.memory.free(slab)

    @contextmanager
    def _given_back_on_error(self, entry: Entry) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.give_back(entry)
            raise

    def check_integrity(self) -> None:
        """Slots, bytes and lists of candidates agree."""
        self.book.check_integrity()
        self._policy.check_integrity()
        assert len(self._placed) == self.book.num_used
        assert not self._evictable.keys() & self._claimed.keys()
        idle = {key for key, entry in self._placed.items() if entry.is_idle}
        assert idle == self._evictable.keys() | self._claimed.keys()
        assert all(entry.state is State.CLAIMED for entry in self._claimed.values())
        assert all(entry.is_resident or entry.state is State.FILLING for entry in self._placed.values())
