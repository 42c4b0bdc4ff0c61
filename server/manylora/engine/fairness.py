"""Fair shares between tenants: virtual token counters.

Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024. Each tenant's counter grows by what its
requests use, divided by its weight; the tenant with the lowest counter is served next. A tenant that comes
back after a pause is lifted to the lowest counter among the active ones, so that pauses cannot be saved up.
Within a tenant: the lowest priority first, then first come, first served. Nobody waits while there is room
(work-conserving).
"""

from collections import deque
from collections.abc import Iterator
from itertools import pairwise, takewhile

from manylora.engine.sequence import Sequence

PROMPT_TOKEN_COST = 1.0
OUTPUT_TOKEN_COST = 2.0  # a decoded token costs about this many prefilled ones, as in the paper


class FairQueue:
    """Waiting sequences of all tenants."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Sequence]] = {}
        self._counters: dict[str, float] = {}
        self._active: dict[str, int] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue

    def enter(self, tenant: str) -> None:
        """A request of this tenant is in the system from now on."""
        if not self._active.get(tenant):
            floor = min((self._counters[t] for t, n in self._active.items() if n), default=None)
            own = self._counters.get(tenant, 0.0)
            self._counters[tenant] = own if floor is None else max(own, floor)
        self._active[tenant] = self._active.get(tenant, 0) + 1

    def leave(self, tenant: str) -> None:
        """A request of this tenant has ended. The last active tenant's counters are dropped with it."""
        self._active[tenant] -= 1
        if not self._active[tenant]:
            del self._active[tenant]
            if not self._active:
                self._counters.clear()

    def push(self, seq: Sequence, *, front: bool = False) -> None:
        """Put it behind all of its tenant's that have its priority or a lower one; with `front`, before the former."""
        queue = self._queues.setdefault(seq.tenant, deque())
        self._length += 1
        if front:
            queue.insert(sum(1 for _ in takewhile(lambda each: each.priority < seq.priority, queue)), seq)
        else:
            num_behind = sum(1 for _ in takewhile(lambda each: each.priority > seq.priority, reversed(queue)))
            queue.insert(len(queue) - num_behind, seq)

    def remove(self, seq: Sequence) -> None:
        queue = self._queues[seq.tenant]
        queue.remove(seq)
        self._length -= 1
        if not queue:
            del self._queues[seq.tenant]

    def tenants(self) -> list[str]:
        """Tenants with waiting sequences, the one to serve first first."""
        return sorted(self._queues, key=lambda t: (self._counters.get(t, 0.0), self._queues[t][0].arrived_s))

    def of(self, tenant: str) -> deque[Sequence]:
        return self._queues.get(tenant, deque())

    def charge(self, seq: Sequence, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """Account for tokens run. Recomputation after a preemption is not the tenant's doing and is not charged."""
        cost = num_prompt_tokens * PROMPT_TOKEN_COST + num_output_tokens * OUTPUT_TOKEN_COST
        self._counters[seq.tenant] = self._counters.get(seq.tenant, 0.0) + cost / seq.weight

    def check_integrity(self) -> None:
        assert all(self._queues.values()), "an empty queue is dropped"
        assert self._length == sum(len(q) for q in self._queues.values())
        assert all(n > 0 for n in self._active.values())
        assert self._active.keys() <= self._counters.keys()
        assert self._queues.keys() <= self._active.keys()
        for queue in self._queues.values():
            assert all(a.priority <= b.priority for a, b in pairwise(queue))
