"""Loads that wait for a thread: a line for each tenant, served in turn, and never all threads to one. No threads here.

A tenant that asks for a thousand adapters at once, or whose adapters come slowly, would otherwise hold up everybody's.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class LoadLine(Generic[K]):
    """Keys in lines. A tenant has at most half of the threads that the others leave, and one at least."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._lines: OrderedDict[str, deque[K]] = OrderedDict()  # whose turn is next comes first
        self._waiting: set[K] = set()
        self._running: Counter[str] = Counter()

    def add(self, key: K, tenants: Iterable[str]) -> None:
        """It waits, for each of these tenants; whose turn comes first gets it its thread. Again: for more tenants."""
        self._waiting.add(key)
        for tenant in tenants:
            line = self._lines.setdefault(tenant, deque())
            if key not in line:
                line.append(key)

    def __contains__(self, key: K) -> bool:
        return key in self._waiting

    def discard(self, key: K) -> bool:
        """It waits no more; False if it did not."""
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
