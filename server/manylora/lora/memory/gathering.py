"""The adapters of one request that are brought together: what is there of them stays until the rest has come.

Two requests that keep what the other waits for would wait for ever. So one group at a time is gathered, and of the
others what is there may leave. A group is gathered once it lacks nothing but places: one that waits for a file to be
read holds up no other one. Bookkeeping: whoever calls holds the tiers' lock.
"""

from collections.abc import Callable, Sequence

from manylora.errors import ManyloraError
from manylora.lora.memory.device import Entry


class Gathering:
    """The group that is gathered, if any. `hold` and `let_go` keep an entry on the device and end that."""

    def __init__(self, hold: Callable[[Entry], None], let_go: Callable[[Entry], None]) -> None:
        self._hold = hold
        self._let_go = let_go
        self.ids: tuple[str, ...] = ()  # other threads read it
        self.entries: tuple[Entry, ...] = ()
        self._error: ManyloraError | None = None

    def is_of(self, entries: Sequence[Entry]) -> bool:
        """Whether these are what is gathered."""
        return bool(self.ids) and self.ids == tuple(entry.ref.id for entry in entries)

    def may_begin(self, entries: Sequence[Entry], is_near: Callable[[Entry], bool]) -> bool:
        """Whether these are to be gathered from now on: none are, and these lack nothing but places (`is_near`)."""
        return not self.entries and all(map(is_near, entries))

    def begin(self, entries: Sequence[Entry]) -> None:
        """Let these be gathered, and no others until `end`."""
        assert not self.entries
        self.ids, self.entries = tuple(entry.ref.id for entry in entries), tuple(entries)
        for entry in entries:
            entry.is_gathered = True
            if entry.is_resident:
                self._hold(entry)

    def end_of(self, entries: Sequence[Entry]) -> None:
        """`end`, if these are what is gathered."""
        if self.is_of(entries):
            self.end()

    def end(self) -> None:
        """Let go of what is there of the group, if there is one."""
        entries, self.ids, self.entries, self._error = self.entries, (), (), None
        for entry in entries:
            entry.is_gathered = False
        for entry in entries:
            self._let_go(entry)

    def fail(self, error: ManyloraError) -> None:
        """The group will never be there together. Whoever asks for it hears of the error, and nobody else does."""
        self._error = error

    def reconsider(self) -> None:
        """Something that stayed may leave now: what `fail` was told may not hold. Whoever is tried again finds out."""
        self._error = None

    def raise_error(self) -> None:
        """Raises what `fail` was told of this group."""
        if self._error is not None:
            raise self._error

    def check_integrity(self) -> None:
        """Each is marked, and what is there of the group has a user."""
        assert self.ids == tuple(entry.ref.id for entry in self.entries)
        assert all(entry.is_gathered and (entry.users or not entry.is_resident) for entry in self.entries)
