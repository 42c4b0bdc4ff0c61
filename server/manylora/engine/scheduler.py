"""What runs in the next step: fair admission, chunked prefill beside decode, preemption when blocks run out.

Bookkeeping only; it touches no tensor and never waits. A sequence whose adapter is not on the device yet is
passed over until it is, and holds nobody up.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from time import monotonic
from typing import Protocol

from manylora.engine.block_manager import BlockManager
from manylora.engine.fairness import FairQueue
from manylora.engine.interface import AdapterRef, FinishReason
from manylora.engine.sequence import Sequence, SequenceStatus
from manylora.errors import ManyloraError

STARVATION_STEPS = 128  # each time a sequence was passed over this often for want of a slot, an adapter yields
LOOK_AHEAD = 256  # waiting sequences of one tenant that a plan looks at


class SlotProvider(Protocol):
    """The part of `lora.tiers.AdapterTiers` that scheduling needs."""

    def acquire(self, ref: AdapterRef) -> int | None: ...

    def release(self, ref: AdapterRef) -> None: ...

    def give_up(self, ref: AdapterRef) -> None: ...


@dataclass(frozen=True, slots=True)
class Scheduled:
    """`num_tokens` tokens of a sequence from position `start` on, in this step."""

    seq: Sequence
    start: int
    num_tokens: int

    @property
    def samples(self) -> bool:
        """The step reaches the sequence's last token, so the next one can be sampled."""
        return self.start + self.num_tokens == self.seq.num_tokens


@dataclass(slots=True)
class Plan:
    """One step's work, sequences with one token first; and the sequences whose adapter failed to load."""

    scheduled: list[Scheduled] = field(default_factory=list)
    failed: list[tuple[Sequence, ManyloraError]] = field(default_factory=list)
    num_tokens: int = 0


class Scheduler:
    """Owns the waiting and the running sequences."""

    def __init__(
        self, blocks: BlockManager, slots: SlotProvider, *, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self.blocks = blocks
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_waiting_for_adapter = 0  # as of the last plan; other threads read it
        self._slots = slots
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._passed_over: Counter[int] = Counter()  # by id() of waiting sequences
        self._yielding: dict[str, Sequence] = {}  # adapter id -> the sequence it makes room for

    @property
    def has_work(self) -> bool:
        return bool(self.running) or len(self.waiting) > 0

    def add(self, seq: Sequence) -> None:
        self.waiting.enter(seq.tenant)
        for follower in seq.followers:
            self.waiting.enter(follower.tenant)
        self.waiting.push(seq)

    def plan(self) -> Plan:
        """Choose the next step's work and reserve its blocks and slots."""
        plan = Plan()
        work: dict[int, Scheduled] = {}
        budget = self._max_num_batched_tokens
        may_admit = True
        for seq in sorted(self.running, key=lambda s: s.num_uncomputed > 1):
            if seq.status is not SequenceStatus.RUNNING or budget <= 0:
                continue
            count = min(seq.num_uncomputed, budget)
            while not self.blocks.allocate(seq, seq.num_computed + count):
                may_admit = False
                victim = self._most_over_share()
                budget += self._preempt(victim, work)
                if victim is seq:
                    break
            else:
                work[id(seq)] = Scheduled(seq, seq.num_computed, count)
                budget -= count
        if may_admit:
            self._admit(plan, work, budget)
        plan.scheduled = sorted(work.values(), key=lambda s: s.num_tokens > 1)
        plan.num_tokens = sum(s.num_tokens for s in plan.scheduled)
        waits = self._passed_over and (s.status is SequenceStatus.LOADING_ADAPTER for s in self.waiting)
        self.num_waiting_for_adapter = sum(waits or ())
        return plan

    def commit(self, plan: Plan) -> None:
        """The step has run: its keys and values are in the cache."""
        for item in plan.scheduled:
            seq = item.seq
            seq.num_computed += item.num_tokens
            self.blocks.mark_computed(seq)
            if seq.followers and seq.is_prefilled:
                for follower in reversed(seq.followers):
                    self.waiting.push(follower, front=True)
                seq.followers = []

    def charge_output(self, seq: Sequence) -> None:
        self.waiting.charge(seq, 0, 1)

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence in whatever state it is, and give back all it holds."""
        if seq.is_finished:
            return
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
            self._release(seq)
        elif self._is_queued(seq):
            self.waiting.remove(seq)
            if seq.adapter and not self._others_want(seq.adapter):
                self._slots.give_up(seq.adapter)
        self._forget_waiting(seq)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason = reason
        seq.finished_s = monotonic()
        self.waiting.leave(seq.tenant)
        for follower in seq.followers:
            self.finish(follower, reason)
        seq.followers = []

    # admission

    def _admit(self, plan: Plan, work: dict[int, Scheduled], budget: int) -> None:
        not_ready: set[str] = set()
        while budget > 0:
            seq = self._next_ready(plan, not_ready, work)
            if seq is None:
                return
            if not self._make_seat(seq, work):
                self._unacquire(seq)
                return
            if not seq.num_charged:
                self.waiting.charge(seq, seq.num_prompt_tokens - seq.num_computed, 0)
                seq.num_charged = seq.num_prompt_tokens
                seq.num_cached_tokens = seq.num_computed
            self._start(seq)
            count = min(seq.num_uncomputed, budget)
            work[id(seq)] = Scheduled(seq, seq.num_computed, count)
            budget -= count

    def _start(self, seq: Sequence) -> None:
        self.waiting.remove(seq)
        self._forget_waiting(seq)
        seq.status = SequenceStatus.RUNNING
        now = monotonic()
        if seq.load_started_s is not None and seq.load_ended_s is None:
            seq.load_ended_s = now
        if seq.first_scheduled_s is None:
            seq.first_scheduled_s = now
        self.running.append(seq)

    def _next_ready(self, plan: Plan, not_ready: set[str], work: dict[int, Scheduled]) -> Sequence | None:
        """The next sequence to serve, its adapter's slot acquired; None when nobody can go on."""
        for tenant in self.waiting.tenants():
            for seq in list(islice(self.waiting.of(tenant), LOOK_AHEAD)):
                if seq.adapter is None:
                    return seq
                if seq.adapter.id in not_ready:
                    continue
                try:
                    ready = self._acquire(seq, seq.adapter, work)
                except ManyloraError as error:
                    plan.failed.append((seq, error))
                    self.finish(seq, FinishReason.ERROR)
                    continue
                if ready:
                    return seq
                not_ready.add(seq.adapter.id)
        return None

    def _acquire(self, seq: Sequence, adapter: AdapterRef, work: dict[int, Scheduled]) -> bool:
        if self._yielding.get(adapter.id, seq) is not seq:
            return False
        slot = self._slots.acquire(adapter)
        if slot is not None:
            seq.slot = slot
            return True
        if seq.status is not SequenceStatus.LOADING_ADAPTER:
            seq.status = SequenceStatus.LOADING_ADAPTER
            if seq.load_started_s is None:
                seq.load_started_s = monotonic()
        self._passed_over[id(seq)] += 1
        if self._passed_over[id(seq)] % STARVATION_STEPS == 0:
            self._make_adapter_yield(seq, adapter, work)
        return False

    def _unacquire(self, seq: Sequence) -> None:
        if seq.adapter is not None:
            self._slots.release(seq.adapter)
            seq.slot = -1

    def _make_adapter_yield(self, starving: Sequence, adapter: AdapterRef, work: dict[int, Scheduled]) -> None:
        """Preempt the running adapter with the fewest sequences and keep it out until `starving` runs."""
        users = Counter(s.adapter.id for s in self.running if s.adapter and s.adapter.id != adapter.id)
        users = Counter({a: n for a, n in users.items() if a not in self._yielding})
        if not users:
            return
        chosen = min(users, key=lambda a: users[a])
        self._yielding[chosen] = starving
        for seq in [s for s in reversed(self.running) if s.adapter and s.adapter.id == chosen]:
            self._preempt(seq, work)

    # room

    def _make_seat(self, seq: Sequence, work: dict[int, Scheduled]) -> bool:
        """A place in the batch and blocks for all of the sequence, from tenants over their share if need be."""
        while len(self.running) >= self._max_num_seqs or not self._has_blocks(seq):
            victim = self._over_share_for(seq)
            if victim is None:
                return False
            self._preempt(victim, work)
        self.blocks.take_prefix(seq)
        if self.blocks.allocate(seq, seq.num_tokens):
            return True
        self.blocks.free(seq)
        return False

    def _has_blocks(self, seq: Sequence) -> bool:
        return self.blocks.blocks_needed(seq, seq.num_tokens) <= self.blocks.num_free

    def _shares(self) -> tuple[Counter[str], dict[str, float]]:
        running = Counter(seq.tenant for seq in self.running)
        weights = {seq.tenant: seq.weight for seq in self.running}
        return running, weights

    def _most_over_share(self) -> Sequence:
        """Whom to preempt: the latest admitted of the tenant that runs most for its weight."""
        running, weights = self._shares()
        tenant = max(running, key=lambda t: running[t] / weights[t])
        return next(seq for seq in reversed(self.running) if seq.tenant == tenant)

    def _over_share_for(self, seq: Sequence) -> Sequence | None:
        """Whom to preempt for a tenant below its fair share of seats; None when that would not be fair."""
        running, weights = self._shares()
        weights[seq.tenant] = seq.weight
        if not running:
            return None
        total = sum(weights.values())

        def share(tenant: str) -> float:
            return max(1.0, self._max_num_seqs * weights[tenant] / total)

        if running[seq.tenant] + 1 > share(seq.tenant):
            return None
        victim = self._most_over_share()
        crowded = len(self.running) >= self._max_num_seqs
        over = running[victim.tenant] > (share(victim.tenant) if crowded else running[seq.tenant] + 1)
        return victim if over and victim.tenant != seq.tenant else None

    def _preempt(self, seq: Sequence, work: dict[int, Scheduled]) -> int:
        """Send a running sequence back to the front of its queue; returns the tokens it gives back to the step."""
        self.running.remove(seq)
        self._release(seq)
        seq.status = SequenceStatus.PREEMPTED
        if not seq.num_output_tokens:
            seq.prompt_logprobs = []
        self.waiting.push(seq, front=True)
        self.num_preemptions += 1
        item = work.pop(id(seq), None)
        return item.num_tokens if item else 0

    def _release(self, seq: Sequence) -> None:
        self.blocks.free(seq)
        if seq.adapter is not None:
            self._slots.release(seq.adapter)
            seq.slot = -1

    # housekeeping

    def _is_queued(self, seq: Sequence) -> bool:
        return seq in self.waiting.of(seq.tenant)

    def _others_want(self, adapter: AdapterRef) -> bool:
        return any(s.adapter is not None and s.adapter.id == adapter.id for s in self.waiting)

    def _forget_waiting(self, seq: Sequence) -> None:
        self._passed_over.pop(id(seq), None)
        for adapter_id in [a for a, s in self._yielding.items() if s is seq]:
            del self._yielding[adapter_id]

    def sequences(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def check_integrity(self) -> None:
        """Every block and slot belongs to a running sequence, and statuses say where sequences are."""
        self.blocks.check_integrity(self.running)
        self.waiting.check_integrity()
        assert len(self.running) <= self._max_num_seqs
        for seq in self.running:
            assert seq.status is SequenceStatus.RUNNING
            assert (seq.slot >= 0) == (seq.adapter is not None)
        for seq in self.waiting:
            assert seq.status in (SequenceStatus.WAITING, SequenceStatus.LOADING_ADAPTER, SequenceStatus.PREEMPTED)
            assert not seq.block_table
            assert seq.slot == -1
        assert self._passed_over.keys() <= {id(s) for s in self.waiting}
        assert all(any(w is s for w in self.waiting) for s in self._yielding.values())
