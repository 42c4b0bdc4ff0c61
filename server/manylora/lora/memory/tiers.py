"""Adapters between disk, host memory and the device: who is where, who uses it, who makes room.

The engine asks with `acquire`, which answers at once: a slot, or "not yet" after starting the load. Loads run
on threads of their own; a slot that is being filled is named by no batch, so a step never waits for one.
Users are counted under the same lock that evicts, so an adapter in use cannot leave.

Adapters that are waited for stand in a line. Each is read to host memory at once. Who finds no place on the device
is tried again, in the line's order, when one may have fallen free, and not before: while everything is in use,
waiting costs nothing, and files are not read over and over. What was brought in for a request stays until that
request has taken it, so that those who wait do not push each other out.
"""

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from manylora.errors import (
    AdapterLoadFailed,
    AdapterNotFound,
    Conflict,
    InvalidAdapter,
    ManyloraError,
    cause_for_caller,
)
from manylora.identity import AdapterRef, Tier
from manylora.lora.format.spec import Adapter
from manylora.lora.memory.device import DeviceTier, Entry, State, TierEvents, no_room_for
from manylora.lora.memory.device_memory import DeviceMemory
from manylora.lora.memory.gathering import Gathering
from manylora.lora.memory.host import HostCache
from manylora.lora.memory.line import LoadLine, WaitingLine
from manylora.lora.memory.packing import PackedAdapter
from manylora.lora.memory.slots import SlotBook
from manylora.threads import holds, runs_on, started_pool

__all__ = ["AdapterTiers", "Packer", "Reader", "TierEvents"]

Reader = Callable[[AdapterRef], Adapter]  # of what is stored
Packer = Callable[[Adapter], PackedAdapter]
_LOADER = "adapter-loader"
LOOK_AHEAD = 256  # of those in the line, how many are looked at when a place falls free


class AdapterTiers:
    """The three tiers. Every public method is thread-safe and returns without waiting for a load."""

    def __init__(
        self,
        book: SlotBook,
        memory: DeviceMemory,
        *,
        host_bytes: int,
        read: Reader,
        pack: Packer,
        on_change: Callable[[], None] = lambda: None,
        events: TierEvents | None = None,
        num_threads: int = 1,
    ) -> None:
        self.book = book
        self.memory = memory
        self.on_change = on_change  # called on a loader thread after every load
        self._read = read
        self._pack = pack
        self._events = events or TierEvents()
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)
        is_held = partial(holds, self._idle)
        self._host = HostCache(host_bytes, lambda ref: self._events.on_eviction(ref, "host"), is_held)
        self._device = DeviceTier(book, memory, self._events, self._settle, is_held)
        self._entries: dict[str, Entry] = {}
        self._waiting: WaitingLine[str] = WaitingLine()  # asked for and not resident
        self._typical_bytes = 0  # of an adapter that was not read yet: as the last one that was
        self._loads: LoadLine[str] = LoadLine(num_threads)  # those whose load has yet to get a thread
        self._pool = started_pool(num_threads, _LOADER)  # the thread that steps may be bound to a CPU
        self._gathering = Gathering(self._hold, self._let_go)
        self._closed = False

    # what the engine calls

    def acquire(self, ref: AdapterRef, tenant: str | None = None) -> int | None:
        """The adapter's slot, with one more user, or None while it is on its way.

        `tenant`: who asks, at whose expense it is loaded; its owner if left out. Raises AdapterLoadFailed when its
        files cannot be brought in.
        """
        with self._lock:
            entry = self._entry(ref)
            self._raise_error_of(entry)
            if entry.is_resident:
                return self._take(entry)
            self._want_for(entry, tenant)
            return None

    def acquire_all(self, refs: Sequence[AdapterRef], tenant: str | None = None) -> tuple[int, ...] | None:
        """The slots of several adapters, in their order, with one more user each; None while any is on its way.

        All or none. One group at a time is gathered (`gathering.py`), until it has all, or `stop_gathering`. Raises
        AdapterLoadFailed when files of one cannot be brought in, or where there never is room for all together.
        """
        with self._lock:
            entries = list(map(self._entry, refs))
            try:
                return self._acquire_all(entries, tenant)
            except BaseException:
                self._gathering.end_of(entries)
                for entry in entries:
                    self._settle(entry)
                raise

    def _acquire_all(self, entries: Sequence[Entry], tenant: str | None) -> tuple[int, ...] | None:
        gathering = self._gathering
        if gathering.is_of(entries):
            gathering.raise_error()
        for entry in entries:
            self._raise_error_of(entry)
        if all(entry.is_resident for entry in entries):
            slots = tuple(self._take(entry) for entry in entries)
            gathering.end_of(entries)
            return slots
        for entry in entries:
            if not entry.is_resident:
                self._want_for(entry, tenant)
        if gathering.may_begin(entries, self._is_near):
            gathering.begin(entries)
            self._room_appeared()  # whoever was refused may hear now that there never is room for all
        return None

    def _is_near(self, e: Entry) -> bool:
        """Whether it lacks nothing but a place, or is not read before there is one since host memory is full."""
        return e.place is not None or e.ref in self._host or self._waiting.was_refused(e.ref.id)

    @property
    def gathered(self) -> tuple[str, ...]:
        """The ids of those that are gathered, in the order of the refs that `acquire_all` was given."""
        return self._gathering.ids

    def stop_gathering(self) -> None:
        """Let go of what is there of the group that is gathered, if there is one. Another one may be from now on."""
        with self._lock:
            self._gathering.end()

    def _take(self, entry: Entry) -> int:
        """The slot of one that is resident, with one more user."""
        assert entry.place is not None
        self._hold(entry)
        self._device.count_use(entry, is_on_host=entry.ref in self._host)
        return entry.place.slot

    def _hold(self, entry: Entry) -> None:
        entry.users += 1
        entry.unclaim()
        self._device.refile(entry)

    def _raise_error_of(self, entry: Entry) -> None:
        if entry.error is not None:
            error, entry.error = entry.error, None
            self._settle(entry)
            raise error

    def prefetch(self, ref: AdapterRef, tenant: str | None = None) -> None:
        """Start bringing an adapter in, because a request for it has been queued. `tenant`: as in `acquire`."""
        with self._lock:
            entry = self._entry(ref)
            if not entry.is_resident:
                self._want_for(entry, tenant)

    def release(self, ref: AdapterRef) -> None:
        """One user less. The adapter stays until room is needed."""
        with self._lock:
            entry = self._entries[ref.id]
            assert entry.users > 0, "released more often than acquired"
            entry.users -= 1
            if entry.users == 0:
                self._idle.notify_all()
                self._refile(entry)

    def _let_go(self, entry: Entry) -> None:
        """Release a part of a mix, or stop waiting for it: the mix is gathered no more."""
        if entry.is_resident:
            self.release(entry.ref)
        else:
            self._settle(entry)

    def give_up(self, ref: AdapterRef) -> None:
        """Nobody waits for this adapter any more."""
        with self._lock:
            entry = self._entries.get(ref.id)
            if entry is None:
                return
            entry.unclaim()
            if not entry.is_pinned:
                self._leave_line(entry)
                entry.error = None
            self._refile(entry)
            self._settle(entry)
            self._retry_waiting()

    def lacks_room(self, ref: AdapterRef) -> bool:
        """Whether it is waited for and found every place in use: it needs one that somebody lets go of."""
        with self._lock:
            entry = self._entries.get(ref.id)
            return entry is not None and entry.state is State.WAITING and self._waiting.was_refused(ref.id)

    def hurry(self, ref: AdapterRef) -> None:
        """The next place that falls free is for this adapter, if it is waited for."""
        with self._lock:
            if self._waiting.hurry(ref.id):
                self._room_appeared()  # it may take what is kept for requests that wait in the queue

    def may_leave(self, ref: AdapterRef) -> bool:
        """Whether its place could be another's once nobody uses it."""
        with self._lock:
            entry = self._entries.get(ref.id)
            return entry is not None and entry.is_resident and not entry.is_pinned and not entry.is_gathered

    # what the catalog calls, through the engine's interface

    def tier_of(self, ref: AdapterRef) -> Tier:
        with self._lock:
            entry = self._entries.get(ref.id)
            if entry is not None and entry.is_resident:
                return "device"
            return "host" if ref in self._host else "disk"

    def offer(self, ref: AdapterRef, adapter: Adapter | None) -> None:
        """Take what was read of this adapter instead of its stored files, until it is offered None."""
        with self._lock:
            entry = self._entry(ref)
            entry.offered = adapter
            self._settle(entry)

    def set_pinned(self, ref: AdapterRef, pinned: bool) -> None:
        """Pinned adapters are brought in and never evicted.

        Raises Conflict where pins would leave no room for any other adapter.
        """
        with self._lock:
            entry = self._entry(ref)
            if pinned and not entry.is_pinned:
                try:
                    self._device.check_pins([e for e in self._entries.values() if e.is_pinned], entry)
                except Conflict:
                    self._settle(entry)
                    raise
            entry.is_pinned = pinned
            entry.unclaim()
            if not pinned:
                self.give_up(ref)  # requests that wait for it ask again
            elif not entry.is_resident:
                self._want(entry)
            else:
                self._refile(entry)
            self._room_appeared()  # whoever was refused may hear now whether there is room beside the pins

    def forget(self, ref: AdapterRef, timeout_s: float | None = None, *, heir: AdapterRef | None = None) -> bool:
        """Wait until nobody uses or loads the adapter, then free its memory. False if `timeout_s` ran out.

        The copy in host memory goes to `heir` where that has the same digest.
        """
        with self._lock:
            entry = self._entries.get(ref.id)
            if entry is None:
                self._host.bequeath(ref, heir)
                return True
            entry.is_forgotten = True
            entry.is_pinned = False
            entry.unclaim()
            self._leave_line(entry)
            self._room_appeared()  # it was pinned perhaps
            if not self._idle.wait_for(lambda: not entry.users and not entry.is_loading, timeout_s):
                return False
            self._leave_line(entry)  # which one who asked meanwhile has joined
            self._device.evict(entry)
            self._host.bequeath(ref, heir)
            self._entries.pop(ref.id, None)
            self._room_appeared()
            return True

    @property
    def host_bytes(self) -> int:
        return self._host.used_bytes

    def host_bytes_of(self, tenant: str) -> int:
        """Of the adapters that this tenant owns."""
        with self._lock:
            return self._host.used_bytes_of(tenant)

    def residents(self) -> list[dict[str, Any]]:
        """One row per adapter on the device, for the dashboard's map of slots."""
        with self._lock:
            return self._device.rows()

    def residency(self) -> dict[str, Any]:
        """The fields of `engine.interface.Residency`."""
        with self._lock:
            placed = sorted((e for e in self._device.entries() if e.is_resident), key=lambda entry: entry.ref.id)
            return {
                "num_slots": self.book.num_slots,
                "device": tuple(entry.ref for entry in placed),
                "host": tuple(self._host),
                "running": tuple(entry.ref for entry in placed if entry.users),
                "waiting": tuple(entry.ref for key, entry in self._entries.items() if key in self._waiting),
                "pinned": frozenset(entry.ref.id for entry in self._entries.values() if entry.is_pinned),
            }

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    # the line

    def _entry(self, ref: AdapterRef) -> Entry:
        entry = self._entries.get(ref.id)
        if entry is None:
            entry = self._entries[ref.id] = Entry(ref)
        return entry

    def _settle(self, entry: Entry) -> None:
        """Drop an entry that says nothing any more, so that ten thousand adapters cost nothing here."""
        says_nothing = entry.offered is None and entry.error is None and not entry.is_pinned and not entry.is_gathered
        if says_nothing and entry.state is State.AWAY:
            self._entries.pop(entry.ref.id, None)

    def _leave_line(self, entry: Entry) -> None:
        self._waiting.leave(entry.ref.id)
        if entry.state is State.WAITING or self._loads.discard(entry.ref.id):
            self._waiting.end(entry.ref.id)
            entry.to(State.AWAY)
        if entry.is_gathered:
            self._gathering.end()

    def _want_for(self, entry: Entry, tenant: str | None) -> None:
        asker = entry.ref.tenant if tenant is None else tenant
        if self._waiting.join(entry.ref.id, asker) and entry.state is State.QUEUED:
            self._loads.add(entry.ref.id, (asker,))
            self._start_loads()
        self._want(entry)

    def _want(self, entry: Entry) -> None:
        """Put it in the line if it is not there yet, and start the load if that can lead to anything."""
        key = entry.ref.id
        self._waiting.join(key)
        if entry.state is State.AWAY:
            entry.to(State.WAITING)
        if entry.is_loading or self._closed:
            return
        is_hurried = self._waiting.is_hurried(key)
        num_chances = partial(self._device.num_chances, entry, self._typical_bytes, is_hurried=is_hurried)
        if self._waiting.begin(key, num_chances, partial(self._host.could_keep, self._typical_bytes, self._waiting)):
            entry.to(State.QUEUED)
            self._loads.add(key, self._waiting.tenants_of(key) or (entry.ref.tenant,))
            self._start_loads()

    def _start_loads(self) -> None:
        while not self._closed and (found := self._loads.next()) is not None:
            entry = self._entries[found[0]]
            entry.to(State.READING)
            self._pool.submit(self._load, entry, found[1])

    def _retry_waiting(self) -> None:
        """Start again, in the line's order, as many as may find a place."""
        for key in self._waiting.first(LOOK_AHEAD):
            self._want(self._entries[key])

    def _room_appeared(self) -> None:
        self._waiting.room_appeared()
        self._gathering.reconsider()
        self._retry_waiting()

    def _refile(self, entry: Entry) -> None:
        if self._device.refile(entry):
            self._room_appeared()

    # loading

    def _load(self, entry: Entry, tenant: str) -> None:
        """On a loader thread, at the tenant's expense: disk to host, host to device.

        Ends with the entry in another state than READING or FILLING, whatever happens.
        """
        assert runs_on(_LOADER)
        error: ManyloraError | None = None
        packed: PackedAdapter | None = None
        started = time.perf_counter()
        try:
            packed = self._to_host(entry)
            started = time.perf_counter()
            if not self._to_place(entry, packed):
                packed = None
        except ManyloraError as caught:
            packed, error = None, caught
        except Exception as caught:  # noqa: BLE001 - who waits must hear of it, or the load is begun again for ever
            packed = None
            error = AdapterLoadFailed(f"Adapter {entry.ref.label} could not be loaded: {cause_for_caller(caught)}")
        with self._lock:
            try:
                if packed is not None:
                    self._publish(entry, packed)
                    self._events.on_load(entry.ref, "host", time.perf_counter() - started)
            finally:
                self._end(entry, tenant, error)
        self.on_change()

    def _end(self, entry: Entry, tenant: str, error: ManyloraError | None) -> None:
        """The load is over: whoever waits for the adapter goes on waiting, or hears of the error."""
        key = entry.ref.id
        if error is not None and key in self._waiting:
            self._waiting.leave(key)
            entry.error = error
            if not isinstance(error, AdapterNotFound):  # deleted while it was asked for: nothing has failed
                self._events.on_failure(entry.ref)
        if entry.is_loading:
            entry.to(State.WAITING if key in self._waiting else State.AWAY)
        self._waiting.end(key)
        self._loads.done(tenant)
        self._start_loads()
        self._settle(entry)
        self._retry_waiting()
        self._idle.notify_all()

    def _to_host(self, entry: Entry) -> PackedAdapter:
        with self._lock:
            packed = self._host.get(entry.ref)
            if packed is not None:
                return packed
            offered = entry.offered
        started = time.perf_counter()
        packed = self._pack_stored(entry.ref) if offered is None else self._pack(offered)
        self._events.on_load(entry.ref, "disk", time.perf_counter() - started)
        with self._lock:
            self._host.keep(entry.ref, packed, self._waiting)
        return packed

    def _pack_stored(self, ref: AdapterRef) -> PackedAdapter:
        """What was accepted before and cannot be read now is no caller's fault."""
        try:
            return self._pack(self._read(ref))
        except InvalidAdapter as error:
            reason = error.problems[0].message if error.problems else error.message
            raise AdapterLoadFailed(f"The stored files of {ref.label} cannot be read: {reason}") from error

    def _to_place(self, entry: Entry, packed: PackedAdapter) -> bool:
        """Find a place and fill it. False where there is none, which goes to whoever is in more of a hurry first."""
        key = entry.ref.id
        with self._lock:
            entry.size_bytes = self._typical_bytes = packed.size_bytes
            if entry.is_forgotten:
                return False
            seen = self._waiting.moment
            is_hurried = self._waiting.is_hurried(key)
            yields = self._waiting.yields(key) and not self._device.keeps_all(entry)  # or both would wait for ever
            if yields or not self._device.make_room(entry, packed, is_hurried=is_hurried):
                self._waiting.refuse(key, seen)
                if self._device.keeps_all(entry):
                    self._gathering.fail(no_room_for(entry, " and the others of the request"))
                    self._events.on_failure(entry.ref)
                return False
        try:
            self._device.fill(entry, packed)
        except BaseException:
            with self._lock:
                self._device.give_back(entry)
                self._waiting.room_appeared()
            raise
        return True

    def _publish(self, entry: Entry, packed: PackedAdapter) -> None:
        is_claimed = entry.ref.id in self._waiting and not entry.is_pinned and not entry.is_gathered
        self._waiting.leave(entry.ref.id)
        entry.error = None
        self._device.publish(entry, packed, is_claimed=is_claimed)
        if entry.is_gathered:
            self._hold(entry)
        stays = entry.is_pinned or entry.is_gathered  # whoever was refused may hear that there never is room
        if stays or self._device.has_unused_places or self._waiting.yields(entry.ref.id):
            self._waiting.room_appeared()  # its slab may give places away now, and who is hurried may take this one
        self._device.count_use(entry, is_on_host=entry.ref in self._host)

    def check_integrity(self) -> None:
        """Slots, counts and bytes agree."""
        with self._lock:
            self._device.check_integrity()
            self._host.check_integrity()
            for key, entry in self._entries.items():
                entry.check_integrity()
                assert not (entry.is_resident and key in self._waiting)
                assert entry.state not in (State.WAITING, State.QUEUED) or key in self._waiting
                assert entry.state is not State.AWAY or key not in self._waiting
                assert (entry.state is State.QUEUED) == (key in self._loads)
            assert {key for key, entry in self._entries.items() if entry.is_gathered} == set(self.gathered)
            self._gathering.check_integrity()
            assert all(key in self._entries for key in self._waiting.first(len(self._waiting)))
            assert all(self._entries.get(e.ref.id) is e for e in self._device.entries())
            self._waiting.check_integrity()
            self._loads.check_integrity()
