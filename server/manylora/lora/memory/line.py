"""The line of adapters that are asked for and not on the device yet. Bookkeeping: no threads, no tensors.

`WaitingLine` says who waits, in what order they are tried, and when again. `LoadLine` shares the loader threads out
among tenants: one that asks for a thousand adapters at once, or whose adapters come slowly, would otherwise hold up
everybody's.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Set
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(slots=True)
class _Waiter:
    tenants: set[str] = field(default_factory=set)
    is_hurried: bool = False
    refused_at: int = -1  # the moment at which it last found no place


class WaitingLine(Generic[K]):
    """Keys that wait for a place, first come, first tried; hurried ones before all others.

    Whoever found no place is tried again once one may have fallen free, and not before: `moment` counts how often that
    was. So while every place is in use, waiting costs nothing.
    """

    def __init__(self) -> None:
        self.moment = 0
        self._waiters: OrderedDict[K, _Waiter] = OrderedDict()
        self._hurried: set[K] = set()
        self._retried: set[K] = set()  # tried now, and found no place before

    def __contains__(self, key: object) -> bool:
        return key in self._waiters

    def __len__(self) -> int:
        return len(self._waiters)

    def first(self, most: int) -> list[K]:
        """Up to `most` of those that wait, in order."""
        return list(islice(self._waiters, most))

    def join(self, key: K, tenant: str | None = None) -> bool:
        """Let `key` wait from now on. True where `tenant` had not asked for it since it joined."""
        waiter = self._waiters.setdefault(key, _Waiter())
        if tenant is None or tenant in waiter.tenants:
            return False
        waiter.tenants.add(tenant)
        return True

    def tenants_of(self, key: K) -> Set[str]:
        """Who asks for it; none where it is waited for on nobody's account."""
        return self._waiters[key].tenants

    def leave(self, key: K) -> None:
        """Let `key` wait no more. Where it was hurried, the others may find a place now."""
        waiter = self._waiters.pop(key, None)
        if waiter is not None and waiter.is_hurried:
            self._hurried.remove(key)
            self.moment += 1

    def hurry(self, key: K) -> bool:
        """Put `key` before all that are not hurried; False where it does not wait, or is hurried already."""
        waiter = self._waiters.get(key)
        if waiter is None or waiter.is_hurried:
            return False
        waiter.is_hurried = True
        self._hurried.add(key)
        self._waiters.move_to_end(key, last=False)
        return True

    def is_hurried(self, key: K) -> bool:
        return key in self._hurried

    def yields(self, key: K) -> bool:
        """Whether the next place is another's, which is hurried."""
        return bool(self._hurried) and key not in self._hurried

    def room_appeared(self) -> None:
        """A place may have fallen free: whoever was refused may be tried again."""
        self.moment += 1

    def refuse(self, key: K, moment: int) -> None:
        """Note that `key` found no place, looking at that moment."""
        waiter = self._waiters.get(key)
        if waiter is not None:
            waiter.refused_at = moment

    def was_refused(self, key: K) -> bool:
        """Whether it waits, and has found every place in use."""
        waiter = self._waiters.get(key)
        return waiter is not None and waiter.refused_at >= 0

    def begin(self, key: K, num_chances: Callable[[], int], can_read_ahead: Callable[[], bool]) -> bool:
        """Whether trying it now can lead to anything; then it counts as tried until `end`.

        `num_chances`: of how many tries that end now a place may come. `can_read_ahead`: whether one that has no chance
        of a place is worth reading all the same, which is done once.
        """
        waiter = self._waiters[key]
        if waiter.refused_at == self.moment:
            return False
        is_retry = waiter.refused_at >= 0
        if len(self._retried) >= num_chances() and (is_retry or not can_read_ahead()):
            waiter.refused_at = waiter.refused_at if is_retry else self.moment
            return False
        if is_retry:
            self._retried.add(key)
        return True

    def end(self, key: K) -> None:
        """The try is over, however it ended."""
        self._retried.discard(key)

    def check_integrity(self) -> None:
        assert self._hurried == {key for key, waiter in self._waiters.items() if waiter.is_hurried}
        assert all(waiter.refused_at <= self.moment for waiter in self._waiters.values())


class LoadLine(Generic[K]):
    """Keys in lines. A tenant has at most half of the threads that the others leave, and one at least."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._lines: OrderedDict[str, deque[K]] = OrderedDict()  # whose turn is next comes first
        self._waiting: set[K] = set()
        self._running: Counter[str] = Counter()

    def add(self, key: K, tenants: Iterable[str]) -> None:
        """Let `key` wait for each of these tenants, or for more; whose turn comes first gets it its thread."""
        self._waiting.add(key)
        for tenant in tenants:
            line = self._lines.setdefault(tenant, deque())
            if key not in line:
                line.append(key)

    def __contains__(self, key: K) -> bool:
        return key in self._waiting

    def discard(self, key: K) -> bool:
        """Let `key` wait no more; False if it did not."""
        if key not in self._waiting:
            return False
        self._waiting.remove(key)
        return True

    def next(self) -> tuple[K, str] | None:
        """What is to be started now, and at whose expense; None when nothing waits or nobody may start any more.

        Whoever starts it calls `done` for that tenant at its end.
        """
        if self._running.total() >= self._num_threads:
            return None
        for tenant in list(self._lines):
            if self._running[tenant] >= self._limit(tenant):
                continue
            key = self._first(tenant)
            if key is not None:
                self._waiting.remove(key)
                self._running[tenant] += 1
                return key, tenant
        return None

    def _first(self, tenant: str) -> K | None:
        """The first of the tenant's line, which goes behind all others' then."""
        line = self._lines.pop(tenant)
        while line:
            key = line.popleft()
            if key in self._waiting:  # else another tenant's turn got it its thread
                if line:
                    self._lines[tenant] = line
                return key
        return None

    def _limit(self, tenant: str) -> int:
        others = self._running.total() - self._running[tenant]
        return max(1, (self._num_threads - others) // 2)

    def done(self, tenant: str) -> None:
        """A load that was started at this tenant's expense has ended."""
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]

    def check_integrity(self) -> None:
        assert self._running.total() <= self._num_threads
        assert all(count > 0 for count in self._running.values())
        assert all(self._lines.values())
        assert self._waiting <= {key for line in self._lines.values() for key in line}
