"""A scheduler without a model: plans are made, and pretended to run."""

import random
from collections import Counter
from collections.abc import Collection

from manylora.engine.block_manager import BlockManager
from manylora.engine.interface import AdapterRef, FinishReason, SamplingParams
from manylora.engine.room import Pace
from manylora.engine.scheduler import Scheduler
from manylora.engine.sequence import Plan, Sequence
from manylora.errors import AdapterLoadFailed


class FakeSlots:
    """A few slots; an adapter that is asked for takes a free one after `delay` more questions."""

    def __init__(self, num_slots: int, delay: int = 0) -> None:
        self.num_slots = num_slots
        self.delay = delay
        self.users: Counter[str] = Counter()
        self.resident: dict[str, int] = {}
        self.asked: Counter[str] = Counter()
        self.broken: set[str] = set()
        self.faults: dict[str, Exception] = {}
        self.pinned: set[str] = set()
        self.hurried: set[str] = set()
        self.gathered: tuple[str, ...] = ()
        self.held: set[AdapterRef] = set()

    def acquire(self, ref: AdapterRef, tenant: str | None = None) -> int | None:
        if ref.id in self.faults:
            raise self.faults[ref.id]
        if ref.id in self.broken:
            raise AdapterLoadFailed("broken")
        if ref.id not in self.resident:
            self.asked[ref.id] += 1
            goes_first = not self.hurried or ref.id in self.hurried
            if self.asked[ref.id] <= self.delay or not goes_first or not self._make_room():
                return None
            self.hurried.discard(ref.id)
            free = set(range(self.num_slots)) - set(self.resident.values())
            self.resident[ref.id] = min(free)
            self.asked[ref.id] = 0
        self.users[ref.id] += 1
        return self.resident[ref.id]

    def _make_room(self) -> bool:
        if len(self.resident) < self.num_slots:
            return True
        idle = [a for a in self.resident if not self.users[a]]
        if idle:
            del self.resident[idle[0]]
        return bool(idle)

    def release(self, ref: AdapterRef) -> None:
        assert self.users[ref.id] > 0
        self.users[ref.id] -= 1

    def give_up(self, ref: AdapterRef) -> None:
        self.asked[ref.id] = 0
        self.hurried.discard(ref.id)

    def lacks_room(self, ref: AdapterRef) -> bool:
        return ref.id not in self.resident and self.asked[ref.id] > self.delay

    def hurry(self, ref: AdapterRef) -> None:
        self.hurried.add(ref.id)

    def may_leave(self, ref: AdapterRef) -> bool:
        return ref.id not in self.pinned and ref.id not in self.gathered

    def acquire_all(self, refs: Collection[AdapterRef], tenant: str | None = None) -> tuple[int, ...] | None:
        ids = tuple(ref.id for ref in refs)
        self.gathered = self.gathered or ids
        found = {ref: slot for ref in refs if (slot := self.acquire(ref, tenant)) is not None}
        if len(found) == len(refs):
            if self.gathered == ids:
                self.stop_gathering()
            return tuple(found.values())
        for ref in found:
            if self.gathered != ids or ref in self.held:
                self.release(ref)
        if self.gathered == ids:
            self.held |= found.keys()
        return None

    def stop_gathering(self) -> None:
        for ref in self.held:
            self.release(ref)
        self.gathered, self.held = (), set()


def ref(name: str) -> AdapterRef:
    return AdapterRef(name, "public", name, 1, name)


def scheduler(
    *,
    slots: FakeSlots | None = None,
    num_blocks: int = 100,
    seats: int = 8,
    budget: int = 32,
    pace: Pace | None = None,
) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, 4),
        slots or FakeSlots(8),
        max_num_seqs=seats,
        max_num_batched_tokens=budget,
        pace=pace,
    )


_numbers = iter(range(10**9))


def request(
    prompt: int = 4,
    output: int = 4,
    tenant: str = "t",
    adapter: str | None = None,
    weight: float = 1.0,
    priority: int = 0,
) -> Sequence:
    return Sequence(
        f"r{next(_numbers)}",
        [random.randrange(1000) for _ in range(prompt)],
        SamplingParams(max_tokens=output),
        tenant=tenant,
        weight=weight,
        adapter=ref(adapter) if adapter else None,
        priority=priority,
    )


def step(scheduler: Scheduler) -> Plan:
    """Plan, pretend to run, and let every sequence that reached its end take a token."""
    plan = scheduler.plan()
    pretend_to_run(scheduler, plan)
    return plan


def pretend_to_run(scheduler: Scheduler, plan: Plan) -> None:
    """Let every sequence that reaches its end take a token."""
    ended = [item.seq for item in plan.scheduled if item.samples]
    for item in plan.scheduled:
        scheduler.commit(item)
    for seq in ended:
        seq.append(1)
        scheduler.charge_output(seq, 1)
        if seq.num_output_tokens >= seq.params.max_tokens:
            scheduler.finish(seq, FinishReason.LENGTH)
    scheduler.check_integrity()


def drain(s: Scheduler, limit: int = 20_000) -> int:
    for count in range(limit):
        if not s.has_work:
            return count
        step(s)
    raise AssertionError("work is left")


def drain_noting(s: Scheduler, requests: list[Sequence], first_token: dict[int, int]) -> int:
    """As `drain`, and when each request got its first token."""
    for count in range(20_000):
        if not s.has_work:
            return count
        step(s)
        for number, r in enumerate(requests):
            if r.num_output_tokens:
                first_token.setdefault(number, count)
    raise AssertionError("work is left")
