"""Rooms for copies of what layers keep of a sequence in place of its past: who has which, and what they are known by.

Bookkeeping only. A copy belongs to the block of the key-value cache that ends where it was made, and is known by that
block's hash: with both, another sequence begins behind the block as if it had run all that came before.
"""

from collections import Counter, OrderedDict

from manylora.engine.counts import SnapshotCounts

__all__ = ["Snapshots"]


class Snapshots:
    """`count` rooms. Each is free, reserved by a sequence that is going to fill it, or known by a block's hash.

    Known rooms that nobody holds are given to others, the least recently used first. A sequence holds the one that it
    begins with until it has run.
    """

    def __init__(self, count: int, size_bytes: int = 0) -> None:
        self.count = count
        self.size_bytes = size_bytes  # of one copy
        self.num_hits = 0  # sequences that began with a copy and have run
        self._free = list(range(count))
        self._known: OrderedDict[bytes, int] = OrderedDict()
        self._holders: Counter[int] = Counter()
        self._forgotten: set[int] = set()  # held, and known by nothing any more

    @property
    def counts(self) -> SnapshotCounts:
        used = self.num_used
        return SnapshotCounts(used, self.count, used * self.size_bytes, self.num_hits)

    @property
    def num_used(self) -> int:
        """Rooms with a copy in them."""
        return len(self._known) + len(self._forgotten)

    def has(self, key: bytes) -> bool:
        """Whether there is a copy for the block of this hash."""
        return key in self._known

    def hold(self, key: bytes) -> int:
        """The room of a known copy, which stays as it is until `let_go`."""
        room = self._known[key]
        self._known.move_to_end(key)
        self._holders[room] += 1
        return room

    def let_go(self, room: int) -> None:
        self._holders[room] -= 1
        if self._holders[room]:
            return
        del self._holders[room]
        if room in self._forgotten:
            self._forgotten.remove(room)
            self._free.append(room)

    def reserve(self) -> int | None:
        """A room to fill; None where all are held or reserved."""
        if self._free:
            return self._free.pop()
        for key, room in self._known.items():
            if room not in self._holders:
                del self._known[key]
                return room
        return None

    def keep(self, key: bytes, room: int) -> None:
        """A reserved room is filled with what the block of this hash, which has no copy yet, ends with."""
        self._known[key] = room

    def give_back(self, room: int) -> None:
        """A reserved room is not going to be filled."""
        self._free.append(room)

    def forget(self, key: bytes) -> None:
        """The block of this hash is gone."""
        room = self._known.pop(key, None)
        if room is None:
            return
        if room in self._holders:
            self._forgotten.add(room)
        else:
            self._free.append(room)

    def check_integrity(self, reserved: list[int], held: list[int]) -> None:
        """Every room is in one place, and held as often as sequences hold it."""
        rooms = [*self._free, *self._known.values(), *self._forgotten, *reserved]
        assert sorted(rooms) == list(range(self.count))
        assert Counter(held) == self._holders
