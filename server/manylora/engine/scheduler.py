"""What runs in the next step: fair admission, chunked prefill beside decode, preemption when blocks run out.

Bookkeeping only; it touches no tensor and never waits. A sequence whose adapter is not on the device yet is
passed over until it is, and holds nobody up.

When more adapters are asked for than have places, they take turns: one that has run for a while yields to one that
waits, soonest where that has had no token yet, and comes back in its turn. Its sequences find most of their blocks
in the prefix cache. So the time to a first token does not grow with the answers of others.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice
from time import monotonic
from typing import Protocol

from manylora.engine.block_manager import BlockManager
from manylora.engine.fairness import FairQueue
from manylora.engine.interface import AdapterRef, FinishReason
from manylora.engine.sequence import Sequence, SequenceStatus
from manylora.errors import ManyloraError

TURN_STEPS = 16  # what an adapter may run, for each of its sequences, before it yields to one that waits for a place
FIRST_TURN_STEPS = 4  # the same, where who waits has had no token yet
LONGEST_TURN_STEPS = 128  # however many sequences it has
HEAD_START_STEPS = 64  # by how much a first token is more urgent than a later one, in steps of waiting
GRANT_STEPS = 8  # how long a place that was given up may take to reach who waits, before another one is
LOOK_AHEAD = 256  # waiting sequences of one tenant that a plan looks at


class SlotProvider(Protocol):
    """The part of `lora.memory.tiers.AdapterTiers` that scheduling needs."""

    def acquire(self, ref: AdapterRef, tenant: str | None = None) -> int | None: ...

    def release(self, ref: AdapterRef) -> None: ...

    def give_up(self, ref: AdapterRef) -> None: ...

    def lacks_room(self, ref: AdapterRef) -> bool: ...

    def hurry(self, ref: AdapterRef) -> None: ...

    def may_leave(self, ref: AdapterRef) -> bool: ...


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
    """One step's work, sequences with one token first."""

    scheduled: list[Scheduled] = field(default_factory=list)
    num_tokens: int = 0


@dataclass(slots=True)
class _Room:
    """What a step may still take: tokens, and among them prompt tokens whose logits are wanted."""

    tokens: int
    prompt_logits: int

    def fits(self, seq: Sequence) -> int:
        """How many of the sequence's tokens."""
        count = min(seq.num_uncomputed, self.tokens)
        return min(count, self.prompt_logits) if seq.wants_prompt_logits and seq.scores_prompt else count

    def take(self, seq: Sequence, count: int) -> None:
        self.tokens -= count
        if seq.wants_prompt_logits and seq.scores_prompt:
            self.prompt_logits -= count


class Scheduler:
    """Owns the waiting and the running sequences.

    Of prompts whose logits are wanted, a step runs at most `max_prompt_logits` tokens.
    """

    def __init__(
        self,
        blocks: BlockManager,
        slots: SlotProvider,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_prompt_logits: int | None = None,
    ) -> None:
        self.blocks = blocks
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        self._preemptions: Counter[str] = Counter()  # by tenant
        self.num_waiting_for_adapter = 0  # as of the last plan; other threads read it
        self._slots = slots
        self.max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_prompt_logits = max_prompt_logits or max_num_batched_tokens
        self._passed_over: Counter[int] = Counter()  # by id() of waiting sequences
        self._yielding: dict[str, Sequence] = {}  # adapter id -> the sequence it makes room for
        self._granted: dict[int, int] = {}  # id() of a waiting sequence -> the plan that made another yield to it
        self._lacking: list[Sequence] = []  # of this plan: the first of each adapter that finds no place
        self._held_since: dict[str, int] = {}  # adapter id -> the plan since which it has run without a break
        self._started: dict[int, int] = {}  # id() of a running sequence -> the plan since which it runs
        self._num_plans = 0
        self._only: Collection[int] | None = None  # id()s of the sequences that the plan may name, None for all
        self._failed: list[tuple[Sequence, ManyloraError]] = []

    @property
    def has_work(self) -> bool:
        return bool(self.running) or len(self.waiting) > 0

    def add(self, seq: Sequence) -> None:
        for each in (seq, *seq.followers):
            self.waiting.enter(each.tenant)
            each.is_counted = True
        self.waiting.push(seq)

    def plan(self, only: Collection[int] | None = None) -> Plan:
        """Choose the next step's work and reserve its blocks and slots; with `only`, for sequences of these id()s.

        Whatever it raises, every sequence is either running or waiting, what was reserved for it is its own, and
        the next plan goes on from there.
        """
        plan = Plan()
        self._only = only
        work: dict[int, Scheduled] = {}
        self._num_plans += 1
        self._lacking.clear()
        room = _Room(self._max_num_batched_tokens, self._max_prompt_logits)
        may_admit = True
        for seq in sorted(self.running, key=lambda s: s.num_uncomputed > 1):
            if seq.status is not SequenceStatus.RUNNING or (only is not None and id(seq) not in only):
                continue
            count = room.fits(seq)
            if count <= 0:
                continue
            while not self.blocks.allocate(seq, seq.num_computed + count):
                may_admit = False
                victim = self._most_over_share()
                room.take(victim, -self._preempt(victim, work))
                if victim is seq:
                    break
            else:
                work[id(seq)] = Scheduled(seq, seq.num_computed, count)
                room.take(seq, count)
        if may_admit:
            self._admit(work, room)
        if self._lacking:
            self._take_turns(work)
        plan.scheduled = sorted(work.values(), key=lambda s: s.num_tokens > 1)
        plan.num_tokens = sum(s.num_tokens for s in plan.scheduled)
        waits = self._passed_over and (s.status is SequenceStatus.LOADING_ADAPTER for s in self.waiting)
        self.num_waiting_for_adapter = sum(waits or ())
        return plan

    def take_failed(self) -> list[tuple[Sequence, ManyloraError]]:
        """The sequences that failed before they ran (their adapter did not load), since this was last asked."""
        failed, self._failed = self._failed, []
        return failed

    def commit(self, item: Scheduled) -> None:
        """The step has run: the keys and values of these tokens are in the cache."""
        seq = item.seq
        seq.num_computed += item.num_tokens
        self.blocks.mark_computed(seq)
        if seq.followers and seq.is_prefilled:
            for follower in reversed(seq.followers):
                self.waiting.push(follower, front=True)
            seq.followers = []

    def fail(self, seq: Sequence, error: ManyloraError) -> None:
        """End a sequence and keep its error for `take_failed`."""
        self._failed.append((seq, error))
        self.finish(seq, FinishReason.ERROR)

    def charge_output(self, seq: Sequence) -> None:
        self.waiting.charge(seq, 0, 1)

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence in whatever state it is, and give back all it holds."""
        if seq.is_finished:
            return
        if seq in self.running:
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
        seq.detokenizer = None
        if seq.is_counted:
            seq.is_counted = False
            self.waiting.leave(seq.tenant)
        for follower in seq.followers:
            self.finish(follower, reason)
        seq.followers = []

    # admission

    def _admit(self, work: dict[int, Scheduled], room: _Room) -> None:
        not_ready: set[str] = set()
        while room.tokens > 0:
            seq = self._next_ready(not_ready)
            if seq is None:
                return
            try:
                if self._make_seat(seq, work):
                    self._start(seq)
            finally:
                if seq.status is not SequenceStatus.RUNNING:
                    self.blocks.free(seq)
                    self._unacquire(seq)
            if seq.status is not SequenceStatus.RUNNING:
                return
            count = room.fits(seq)
            if count:
                work[id(seq)] = Scheduled(seq, seq.num_computed, count)
                room.take(seq, count)

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
        self._started[id(seq)] = self._num_plans
        if seq.adapter is not None:
            self._held_since.setdefault(seq.adapter.id, self._num_plans)
        if not seq.num_charged:
            seq.num_charged = seq.num_prompt_tokens
            seq.num_cached_tokens = seq.num_computed
            self.waiting.charge(seq, seq.num_prompt_tokens - seq.num_computed, 0)

    def _is_meant(self, seq: Sequence) -> bool:
        return self._only is None or id(seq) in self._only

    def _next_ready(self, not_ready: set[str]) -> Sequence | None:
        """The next sequence to serve, its adapter's slot acquired; None when nobody can go on."""
        for tenant in self.waiting.tenants():
            for seq in list(islice(self.waiting.of(tenant), LOOK_AHEAD)):
                if not self._is_meant(seq):
                    continue
                if seq.adapter is None:
                    return seq
                if seq.adapter.id in not_ready:
                    continue
                try:
                    ready = self._acquire(seq, seq.adapter)
                except ManyloraError as error:
                    self.fail(seq, error)
                    continue
                if ready:
                    return seq
                not_ready.add(seq.adapter.id)
        return None

    def _acquire(self, seq: Sequence, adapter: AdapterRef) -> bool:
        if self._yielding.get(adapter.id, seq) is not seq:
            return False
        slot = self._slots.acquire(adapter, seq.tenant)
        if slot is not None:
            seq.slot = slot
            return True
        if seq.status is not SequenceStatus.LOADING_ADAPTER:
            seq.status = SequenceStatus.LOADING_ADAPTER
            if seq.load_started_s is None:
                seq.load_started_s = monotonic()
        self._passed_over[id(seq)] += 1
        if self._slots.lacks_room(adapter):
            self._lacking.append(seq)
        return False

    def _unacquire(self, seq: Sequence) -> None:
        if seq.adapter is not None:
            self._slots.release(seq.adapter)
            seq.slot = -1

    # turns

    def _take_turns(self, work: dict[int, Scheduled]) -> None:
        """Make one adapter yield to the most urgent of those that find no place, if one has had its turn."""
        lacking = [s for s in self._lacking if self._num_plans - self._granted.get(id(s), -GRANT_STEPS) >= GRANT_STEPS]
        held, share = self._places_held(lacking)
        at_share = {tenant for tenant, count in held.items() if count >= share}
        starving, turn_steps = self._most_urgent(lacking, at_share)
        if starving is None or starving.adapter is None:
            return
        yielding = at_share
        if starving.tenant in at_share:  # it takes turns with itself, and with who has more than that
            yielding = {starving.tenant} | {tenant for tenant, count in held.items() if count > share}
        chosen = self._who_yields(turn_steps, yielding)
        if chosen is None:
            if not any(s.adapter is not None and self._slots.may_leave(s.adapter) for s in self.running):
                self._slots.hurry(starving.adapter)  # into a place that is kept for another one that waits
            return
        self._slots.hurry(starving.adapter)
        self._granted[id(starving)] = self._num_plans
        self._yielding[chosen] = starving
        for seq in [s for s in reversed(self.running) if s.adapter and s.adapter.id == chosen]:
            self._preempt(seq, work)

    def _places_held(self, lacking: list[Sequence]) -> tuple[Counter[str], float]:
        """How many adapters each tenant runs, and how many would be an equal share of these for all who want some."""
        held = Counter(tenant for tenant, _ in {(s.tenant, s.adapter.id) for s in self.running if s.adapter})
        return held, held.total() / max(1, len(held.keys() | {s.tenant for s in lacking}))

    def _most_urgent(self, lacking: list[Sequence], at_share: set[str]) -> tuple[Sequence | None, int]:
        """Who has waited longest, new ones with a head start; and how long an adapter must have run to yield to it.

        Tenants that have their share of places already come last, however many of their adapters wait.
        A tenant begins no more requests than its share of seats: beyond, they would only slow each other down, and
        a new one waits for a place to fall free, or for an adapter that has run for very long.
        """
        begun = Counter(s.tenant for s in (*self.running, *self.waiting) if s.num_output_tokens)
        num_tenants = len({s.tenant for s in self.running} | set(self.waiting.tenants()))
        may_begin = {t for t in {s.tenant for s in lacking} if begun[t] * num_tenants < self.max_num_seqs}

        def urgency(seq: Sequence) -> int:
            return self._passed_over[id(seq)] + (0 if seq.num_output_tokens else HEAD_START_STEPS)

        allowed = [s for s in lacking if s.num_output_tokens or s.tenant in may_begin]
        below = [s for s in allowed if s.tenant not in at_share]
        starving = max(below or allowed or lacking, key=urgency, default=None)
        if starving is None or not allowed:
            return starving, LONGEST_TURN_STEPS
        return starving, TURN_STEPS if starving.num_output_tokens else FIRST_TURN_STEPS

    def _who_yields(self, turn_steps: int, tenants: set[str]) -> str | None:
        """The adapter that has run longest for the number of its sequences; None if none has had its turn.

        It is one that these `tenants` alone use, if there are such.
        """
        users: dict[str, list[Sequence]] = {}
        for seq in self.running:
            if seq.adapter is not None and seq.adapter.id not in self._yielding:
                users.setdefault(seq.adapter.id, []).append(seq)
        theirs = {adapter_id: seqs for adapter_id, seqs in users.items() if all(s.tenant in tenants for s in seqs)}
        longest: tuple[float, str | None] = (0.0, None)
        for adapter_id, seqs in (theirs or users).items():
            steps = self._num_plans - self._held_since[adapter_id]
            turn = min(turn_steps * len(seqs), LONGEST_TURN_STEPS)
            has_begun = all(s.num_output_tokens for s in seqs) or steps >= LONGEST_TURN_STEPS
            adapter = seqs[0].adapter
            if steps >= turn and has_begun and adapter is not None and self._slots.may_leave(adapter):
                longest = max(longest, (steps / len(seqs), adapter_id))
        return longest[1]

    # room

    def _make_seat(self, seq: Sequence, work: dict[int, Scheduled]) -> bool:
        """A place in the batch and blocks for all of the sequence, from tenants over their share if need be."""
        while len(self.running) >= self.max_num_seqs or not self._has_blocks(seq):
            victim = self._over_share_for(seq)
            if victim is None:
                return False
            self._preempt(victim, work)
        self.blocks.take_prefix(seq)
        return self.blocks.allocate(seq, seq.num_tokens)

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
        """Whom to preempt for a tenant below its share of what is short; None when that would not be fair."""
        running, weights = self._shares()
        weights[seq.tenant] = seq.weight
        if not running:
            return None
        part = {tenant: weight / sum(weights.values()) for tenant, weight in weights.items()}
        if len(self.running) >= self.max_num_seqs:
            share = {tenant: max(1.0, self.max_num_seqs * part[tenant]) for tenant in part}
            if running[seq.tenant] + 1 > share[seq.tenant]:
                return None
            victim = self._most_over_share()
            is_over = running[victim.tenant] > share[victim.tenant]
            return victim if is_over and victim.tenant != seq.tenant else None
        return self._over_share_of_blocks(seq, {tenant: self.blocks.num_blocks * part[tenant] for tenant in part})

    def _over_share_of_blocks(self, seq: Sequence, share: dict[str, float]) -> Sequence | None:
        """The latest of the tenant that holds most blocks for its `share`. A tenant's only one has its turn first."""
        held = Counter[str]()
        for each in self.running:
            held[each.tenant] += len(each.block_table)
        if held[seq.tenant] + self.blocks.blocks_needed(seq, seq.num_tokens) > share[seq.tenant]:
            return None
        tenant = max(held, key=lambda t: held[t] / share[t])
        if tenant == seq.tenant or held[tenant] <= share[tenant]:
            return None
        theirs = [each for each in self.running if each.tenant == tenant]
        has_had_turn = len(theirs) > 1 or self._num_plans - self._started[id(theirs[-1])] >= LONGEST_TURN_STEPS
        return theirs[-1] if has_had_turn else None

    def _preempt(self, seq: Sequence, work: dict[int, Scheduled]) -> int:
        """Send a running sequence back to the front of its queue; returns the tokens it gives back to the step."""
        self.running.remove(seq)
        try:
            self._release(seq)
        finally:
            seq.status = SequenceStatus.PREEMPTED
            if not seq.num_output_tokens:
                seq.prompt_logprobs = []
            self.waiting.push(seq, front=True)
        self._preemptions[seq.tenant] += 1
        item = work.pop(id(seq), None)
        return item.num_tokens if item else 0

    def _release(self, seq: Sequence) -> None:
        self.blocks.free(seq)
        del self._started[id(seq)]
        if seq.adapter is not None:
            if not any(s.adapter is not None and s.adapter.id == seq.adapter.id for s in self.running):
                del self._held_since[seq.adapter.id]
            seq.slot = -1  # before it is let go of: whatever that raises, nobody may let go of it once more
            self._slots.release(seq.adapter)

    # housekeeping

    def _is_queued(self, seq: Sequence) -> bool:
        return seq in self.waiting.of(seq.tenant)

    def _others_want(self, adapter: AdapterRef) -> bool:
        return any(s.adapter is not None and s.adapter.id == adapter.id for s in self.waiting)

    def _forget_waiting(self, seq: Sequence) -> None:
        self._passed_over.pop(id(seq), None)
        self._granted.pop(id(seq), None)
        for adapter_id in [a for a, s in self._yielding.items() if s is seq]:
            del self._yielding[adapter_id]

    # Other threads read these: each takes a copy in one go.

    @property
    def num_preemptions(self) -> int:
        return sum(list(self._preemptions.values()))

    def num_preemptions_of(self, tenant: str) -> int:
        return self._preemptions[tenant]

    def running_of(self, tenant: str) -> list[Sequence]:
        return [seq for seq in list(self.running) if seq.tenant == tenant]

    def waiting_of(self, tenant: str) -> list[Sequence]:
        return list(self.waiting.of(tenant))

    def sequences(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def check_integrity(self) -> None:
        """Every block and slot belongs to a running sequence, and statuses say where sequences are."""
        self.blocks.check_integrity(self.running)
        self.waiting.check_integrity()
        assert len(self.running) <= self.max_num_seqs
        for seq in self.running:
            assert seq.status is SequenceStatus.RUNNING
            assert (seq.slot >= 0) == (seq.adapter is not None)
        for seq in self.waiting:
            assert seq.status in (SequenceStatus.WAITING, SequenceStatus.LOADING_ADAPTER, SequenceStatus.PREEMPTED)
            assert not seq.block_table
            assert seq.slot == -1
        assert self._started.keys() == {id(s) for s in self.running}
        assert self._passed_over.keys() | self._granted.keys() <= {id(s) for s in self.waiting}
        assert self._held_since.keys() == {s.adapter.id for s in self.running if s.adapter is not None}
        assert all(any(w is s for w in self.waiting) for s in self._yielding.values())
