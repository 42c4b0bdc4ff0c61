"""Adapters between disk, host memory and the device: who is where, who uses it, who makes room.

The engine asks with `acquire`, which answers at once: a slot, or "not yet" after starting the load. Loads run
on threads of their own; a slot that is being filled is named by no batch, so a step never waits for one.
Users are counted under the same lock that evicts, so an adapter in use cannot leave.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manylora.errors import AdapterLoadFailed, ManyloraError
from manylora.lora.eviction import GreedyDualSizeFrequency
from manylora.lora.memory import DeviceMemory
from manylora.lora.packing import PackedAdapter
from manylora.lora.ref import AdapterRef, Tier
from manylora.lora.slots import Place, SlotBook

Packer = Callable[[Path], PackedAdapter]
FolderOf = Callable[[AdapterRef], Path]


@dataclass(slots=True)
class _Entry:
    ref: AdapterRef
    folder: Path | None = None
    place: Place | None = None
    is_resident: bool = False
    is_loading: bool = False
    is_pinned: bool = False
    is_forgotten: bool = False
    users: int = 0
    error: ManyloraError | None = None
    size_bytes: int = 0


class TierEvents:
    """What the tiers tell the metrics. The base class says nothing."""

    def on_load(self, ref: AdapterRef, tier: Tier, seconds: float) -> None:
        """It went up from `tier`: from disk to host memory, or from there to the device."""

    def on_failure(self, ref: AdapterRef) -> None:
        """It was asked for and could not be brought to the device."""

    def on_eviction(self, ref: AdapterRef, tier: Tier) -> None:
        """It left `tier` to make room."""

    def on_enter(self, ref: AdapterRef) -> None:
        """A device slot is its own from now on."""

    def on_leave(self, ref: AdapterRef) -> None:
        """Its device slot is free again."""


class AdapterTiers:
    """The three tiers. Every public method is thread-safe and returns without waiting for a load."""

    def __init__(
        self,
        book: SlotBook,
        memory: DeviceMemory,
        *,
        host_bytes: int,
        folder_of: FolderOf,
        packer: Packer,
        on_change: Callable[[], None] = lambda: None,
        events: TierEvents | None = None,
        num_threads: int = 1,
    ) -> None:
        self.book = book
        self.memory = memory
        self.host_bytes = 0
        self._host_budget = host_bytes
        self._host: OrderedDict[AdapterRef, PackedAdapter] = OrderedDict()
        self._folder_of = folder_of
        self._packer = packer
        self.on_change = on_change  # called on a loader thread after every load
        self._events = events or TierEvents()
        self._entries: dict[str, _Entry] = {}
        self._wanted: dict[str, _Entry] = {}  # not resident, asked for; in the order they were asked for
        self._policy: GreedyDualSizeFrequency[str] = GreedyDualSizeFrequency()
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="adapter-loader")
        self._closed = False

    # what the engine calls

    def acquire(self, ref: AdapterRef) -> int | None:
        """The adapter's slot, with one more user, or None while it is on its way.

        Raises AdapterLoadFailed when its files cannot be brought in.
        """
        with self._lock:
            entry = self._entry(ref)
            if entry.error is not None:
                error, entry.error = entry.error, None
                self._settle(entry)
                raise error
            if entry.is_resident and entry.place is not None:
                entry.users += 1
                self._policy.on_use(ref.id, entry.size_bytes, float(entry.size_bytes))
                return entry.place.slot
            self._want(entry)
            return None

    def prefetch(self, ref: AdapterRef) -> None:
        """Start bringing an adapter in, because a request for it has been queued."""
        with self._lock:
            entry = self._entry(ref)
            if not entry.is_resident:
                self._want(entry)

    def release(self, ref: AdapterRef) -> None:
        """One user less. The adapter stays until room is needed."""
        with self._lock:
            entry = self._entries[ref.id]
            assert entry.users > 0, "released more often than acquired"
            entry.users -= 1
            if entry.users == 0:
                self._idle.notify_all()
                self._retry_wanted()

    def give_up(self, ref: AdapterRef) -> None:
        """Nobody waits for this adapter any more."""
        with self._lock:
            entry = self._entries.get(ref.id)
            if entry is not None and not entry.is_pinned:
                self._wanted.pop(ref.id, None)
                entry.error = None
                self._settle(entry)

    # what the catalog calls, through the engine's interface

    def tier_of(self, ref: AdapterRef) -> Tier:
        with self._lock:
            entry = self._entries.get(ref.id)
            if entry is not None and entry.is_resident:
                return "device"
            return "host" if ref in self._host else "disk"

    def offer(self, ref: AdapterRef, folder: Path | None) -> None:
        """Load this adapter from `folder` instead of asking the catalog, until it is offered None."""
        with self._lock:
            entry = self._entry(ref)
            entry.folder = folder
            self._settle(entry)

    def set_pinned(self, ref: AdapterRef, pinned: bool) -> None:
        """Pinned adapters are brought in and never evicted."""
        with self._lock:
            entry = self._entry(ref)
            entry.is_pinned = pinned
            if not pinned:
                self.give_up(ref)  # requests that wait for it ask again
            elif not entry.is_resident:
                self._want(entry)

    def forget(self, ref: AdapterRef, timeout_s: float | None = None) -> bool:
        """Wait until nobody uses or loads the adapter, then free its memory. False if `timeout_s` ran out."""
        with self._lock:
            entry = self._entries.get(ref.id)
            if entry is None:
                self._drop_host(ref)
                return True
            entry.is_forgotten = True
            entry.is_pinned = False
            self._wanted.pop(ref.id, None)
            if not self._idle.wait_for(lambda: not entry.users and not entry.is_loading, timeout_s):
                return False
            self._evict_device(entry)
            self._drop_host(ref)
            self._entries.pop(ref.id, None)
            self._retry_wanted()
            return True

    def residents(self) -> list[dict[str, Any]]:
        """One row per adapter on the device, for the dashboard's map of slots."""
        with self._lock:
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
                for e in self._entries.values()
                if e.is_resident and e.place is not None
            ]

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    # loading

    def _entry(self, ref: AdapterRef) -> _Entry:
        entry = self._entries.get(ref.id)
        if entry is None:
            entry = self._entries[ref.id] = _Entry(ref)
        return entry

    def _settle(self, entry: _Entry) -> None:
        """Drop an entry that says nothing any more, so that ten thousand adapters cost nothing here."""
        idle = not (entry.is_resident or entry.is_loading or entry.is_pinned or entry.users)
        if idle and entry.folder is None and entry.error is None and entry.ref.id not in self._wanted:
            self._entries.pop(entry.ref.id, None)

    def _want(self, entry: _Entry) -> None:
        self._wanted.setdefault(entry.ref.id, entry)
        if not entry.is_loading and not self._closed:
            entry.is_loading = True
            self._pool.submit(self._load, entry)

    def _retry_wanted(self) -> None:
        """Room may have appeared: start again what waits for a slot."""
        for entry in list(self._wanted.values()):
            if entry.error is None:
                self._want(entry)

    def _load(self, entry: _Entry) -> None:
        """On a loader thread: disk to host, host to device. Ends with `is_loading` false, whatever happens."""
        try:
            packed = self._to_host(entry)
            self._to_device(entry, packed)
        except ManyloraError as error:
            self._fail(entry, error)
        except (OSError, ValueError, KeyError, RuntimeError, MemoryError) as error:
            self._fail(entry, AdapterLoadFailed(f"Adapter {entry.ref.label} could not be loaded: {error}"))
        finally:
            with self._lock:
                entry.is_loading = False
                self._settle(entry)
                self._idle.notify_all()
        self.on_change()

    def _fail(self, entry: _Entry, error: ManyloraError) -> None:
        with self._lock:
            if self._wanted.pop(entry.ref.id, None) is None:
                return
            entry.error = error
        self._events.on_failure(entry.ref)

    def _to_host(self, entry: _Entry) -> PackedAdapter:
        with self._lock:
            packed = self._host.get(entry.ref)
            if packed is not None:
                self._host.move_to_end(entry.ref)
                return packed
            folder = entry.folder
        started = time.perf_counter()
        packed = self._packer(folder or self._folder_of(entry.ref))
        self._events.on_load(entry.ref, "disk", time.perf_counter() - started)
        with self._lock:
            self._keep_on_host(entry.ref, packed)
        return packed

    def _keep_on_host(self, ref: AdapterRef, packed: PackedAdapter) -> None:
        if packed.size_bytes > self._host_budget or ref in self._host:
            return
        while self.host_bytes + packed.size_bytes > self._host_budget:
            oldest = next(iter(self._host))
            self._drop_host(oldest)
            self._events.on_eviction(oldest, "host")
        self._host[ref] = packed
        self.host_bytes += packed.size_bytes

    def _drop_host(self, ref: AdapterRef) -> None:
        packed = self._host.pop(ref, None)
        if packed is not None:
            self.host_bytes -= packed.size_bytes

    def _to_device(self, entry: _Entry, packed: PackedAdapter) -> None:
        started = time.perf_counter()
        with self._lock:
            if entry.is_resident or entry.is_forgotten:
                return
            place = self._make_room(packed)
            if place is None:
                return  # in host memory; tried again when a slot falls free
            entry.place = place
            entry.size_bytes = packed.size_bytes
            self._events.on_enter(entry.ref)
            with self._place_given_back_on_error(entry):
                if place.is_new_slab:
                    self.memory.allocate(place, packed.layout, self.book.places_in(place.slab))
        with self._place_given_back_on_error(entry):
            self.memory.fill(place, packed)
        with self._lock:
            self.memory.publish(place, packed)
            entry.is_resident = True
            entry.error = None
            self._wanted.pop(entry.ref.id, None)
            self._policy.on_use(entry.ref.id, entry.size_bytes, float(entry.size_bytes))
        self._events.on_load(entry.ref, "host", time.perf_counter() - started)

    def _make_room(self, packed: PackedAdapter) -> Place | None:
        """A reserved place, evicting idle adapters as needed; None while all that could leave is in use."""
        if not self.book.can_ever_hold(packed.layout):
            raise AdapterLoadFailed(
                f"The adapter needs {packed.size_bytes} bytes on the device and the whole budget is "
                f"{self.book.budget_bytes}: raise --adapter-memory."
            )
        place = self.book.reserve(packed.layout)
        while place is None:
            victim = self._policy.victim(
                key
                for key, e in self._entries.items()
                if e.is_resident and not e.users and not e.is_pinned and not e.is_loading
            )
            if victim is None:
                return None
            evicted = self._entries[victim]
            self._evict_device(evicted)
            self._settle(evicted)
            self._events.on_eviction(evicted.ref, "device")
            place = self.book.reserve(packed.layout)
        return place

    def _evict_device(self, entry: _Entry) -> None:
        if entry.place is None or not entry.is_resident:
            return
        entry.is_resident = False
        self.memory.withdraw(entry.place.slot)
        self._give_place_back(entry)
        self._policy.on_remove(entry.ref.id)

    @contextmanager
    def _place_given_back_on_error(self, entry: _Entry) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._give_place_back(entry)
            raise

    def _give_place_back(self, entry: _Entry) -> None:
        with self._lock:
            assert entry.place is not None
            slot, entry.place = entry.place.slot, None
            self._events.on_leave(entry.ref)
            slab = self.book.release(slot)
            if slab is not None:
                self.memory.free(slab)

    def check_integrity(self) -> None:
        """Slots, counts and bytes agree."""
        with self._lock:
            self.book.check_integrity()
            placed = [e for e in self._entries.values() if e.place is not None]
            assert len(placed) == self.book.num_used
            for entry in self._entries.values():
                assert entry.users >= 0
                assert not entry.users or entry.is_resident
                assert not entry.is_resident or entry.place is not None
                assert not (entry.is_resident and entry.ref.id in self._wanted)
            assert self._wanted.keys() <= self._entries.keys()
            assert self.host_bytes == sum(p.size_bytes for p in self._host.values()) <= self._host_budget
