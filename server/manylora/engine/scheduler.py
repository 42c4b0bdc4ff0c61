"""What runs in the next step: fair admission, chunked prefill beside decode, preemption when blocks run out.

Of the prompts, the one that came first has half of what a step has for them as long as others wait, and the shortest of
these have the rest: a long prompt keeps nobody from a first token, and short ones do not keep it from its end.

Bookkeeping only; it touches no tensor and never waits. A sequence whose adapter is not on the device yet is
passed over until it is, and holds nobody up.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from itertools import islice
from time import monotonic
from typing import Final, Protocol

from manylora.engine.block_manager import BlockManager
from manylora.engine.drafting import Drafter
from manylora.engine.fairness import FairQueue
from manylora.engine.interface import AdapterRef, FinishReason
from manylora.engine.pieces import Pieces
from manylora.engine.room import Pace, PromptCost, Room, is_few
from manylora.engine.sequence import Plan, Scheduled, Sequence, SequenceStatus
from manylora.engine.turns import Places, Turns
from manylora.errors import ManyloraError

LOOK_AHEAD: Final = 256  # waiting sequences of one tenant that a plan looks at
# Beside more, drafts of held answers cost the masks' thread more time than the model saves.
_LOOKING_ROWS: Final = 8


class SlotProvider(Places, Protocol):
    """The part of `lora.memory.tiers.AdapterTiers` that scheduling needs."""

    def acquire(self, ref: AdapterRef, tenant: str | None = None) -> int | None: ...

    def release(self, ref: AdapterRef) -> None: ...

    def give_up(self, ref: AdapterRef) -> None: ...

    def acquire_all(self, refs: SequenceOf[AdapterRef], tenant: str | None = None) -> tuple[int, ...] | None: ...

    @property
    def gathered(self) -> tuple[str, ...]: ...

    def stop_gathering(self) -> None: ...


class Scheduler:
    """Owns the waiting and the running sequences.

    Of prompts whose logits are wanted, and of drafts, a step runs at most `max_prompt_logits` tokens. With `runs_whole`
    an input runs in one step, as a model that looks in both directions needs it. `num_kept` says of a slot how many of
    its adapter's virtual tokens, from the first on, need only be copied. Of a prompt a step runs
    whole `pieces`, where there are some.
    """

    def __init__(
        self,
        blocks: BlockManager,
        slots: SlotProvider,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_prompt_logits: int | None = None,
        prompt_cost: PromptCost | None = None,
        pace: Pace | None = None,
        drafter: Drafter | None = None,
        runs_whole: bool = False,
        num_kept: Callable[[int], int] = lambda _slot: 0,
        pieces: Pieces | None = None,
    ) -> None:
        self.blocks = blocks
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        self._preemptions: Counter[str] = Counter()  # by tenant
        self.num_waiting_for_adapter = 0  # other threads read it
        self._slots = slots
        self.max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_prompt_logits = max_prompt_logits or max_num_batched_tokens
        self._prompt_cost = prompt_cost or PromptCost()
        self._pace = pace
        self._drafter = drafter
        self._runs_whole = runs_whole
        self._num_kept = num_kept
        self._pieces = pieces
        self._turns = Turns(self.running, self.waiting, slots, max_num_seqs)
        self._only: Collection[Sequence] | None = None  # the sequences that the plan may name, None for all
        self._failed: list[tuple[Sequence, ManyloraError]] = []

    @property
    def has_work(self) -> bool:
        return bool(self.running) or len(self.waiting) > 0

    def add(self, seq: Sequence) -> None:
        for each in (seq, *seq.followers):
            self.waiting.enter(each.tenant)
            each.is_counted = True
        self.waiting.push(seq)

    def plan(self, only: Collection[Sequence] | None = None) -> Plan:
        """Choose the next step's work and reserve its blocks and slots; with `only`, for these sequences.

        Whatever it raises, every sequence is either running or waiting, what was reserved for it is its own, and
        the next plan goes on from there.
        """
        self._only = only
        work: list[Scheduled] = []
        self._turns.begin_plan()
        room = Room(self._max_num_batched_tokens, self._max_prompt_logits, self._prompt_cost, self._pieces)
        meant = [seq for seq in self.running if self._is_meant(seq)]
        may_admit = self._take(work, room, [seq for seq in meant if seq.num_uncomputed <= 1])
        prompts = [seq for seq in meant if seq.num_uncomputed > 1]
        # Inputs that run whole have nothing to keep for later: those that an interrupted plan has left run in order.
        first = [] if self._runs_whole else prompts[:1]
        others = prompts if self._runs_whole else sorted(prompts[1:], key=lambda s: s.num_uncomputed)
        num_streams = len(work)
        room.begin_prompts(num_streams, first, num_others=len(others) + len(self.waiting), pace=self._pace)
        effort = room.effort
        may_admit &= self._take(work, room, others)
        if may_admit:
            self._admit(work, room)
        room.open_kept()
        self._take(work, room, first)
        effort -= room.effort
        self._take_turns(work)
        if self._drafter is not None:
            work = [self._with_draft(item, room, self._drafter, len(work)) for item in work]
        work.sort(key=lambda s: s.num_rows > 1)
        return Plan(work, sum(s.num_rows for s in work), effort if is_few(num_streams) else None)

    def ran(self, plan: Plan, seconds: float) -> None:
        """The plan's step took so long, from the model's beginning to the last sample."""
        if self._pace is not None and plan.effort is not None:
            self._pace.saw(plan.effort, seconds)

    def _take(self, work: list[Scheduled], room: Room, seqs: Iterable[Sequence]) -> bool:
        """Plan what fits of running sequences, and preempt for their blocks; whether there were blocks for all."""
        had_blocks = True
        for seq in seqs:
            if seq.status is not SequenceStatus.RUNNING:
                continue  # preempted for another one of this plan
            count = self._fits(seq, room)
            if count <= 0:
                continue
            while not self.blocks.allocate(seq, seq.num_computed + count):
                had_blocks = False
                victim = self._most_over_share()
                room.take(victim, -self._preempt(victim, work))
                if victim is seq:
                    break
            else:
                self._add(work, room, seq, count)
        return had_blocks

    def take_failed(self) -> list[tuple[Sequence, ManyloraError]]:
        """The sequences that failed before they ran (their adapter did not load), since this was last asked."""
        failed, self._failed = self._failed, []
        return failed

    def commit(self, item: Scheduled) -> None:
        """The step has run: the keys and values of these tokens are in the cache; its draft's are for `accept`."""
        seq = item.seq
        seq.num_computed += item.num_tokens
        self.blocks.mark_computed(seq)
        if seq.followers and seq.is_prefilled:
            for follower in reversed(seq.followers):
                self.waiting.push(follower, front=True)
            seq.followers = []

    def accept(self, item: Scheduled, num_accepted: int) -> None:
        """Of the draft, so many tokens are the sequence's now. What was run of the others is as if it never was."""
        seq = item.seq
        if self._drafter is not None:
            self._drafter.learn(seq, len(item.draft), num_accepted)
        if num_accepted:
            seq.num_computed += num_accepted
            self.blocks.mark_computed(seq)
        self.blocks.shrink(seq, seq.num_tokens)

    def half_of(self, item: Scheduled) -> int:
        """How many of its tokens are about half of them, and whole pieces where there are several."""
        if self._pieces is None:
            return item.num_tokens // 2
        sizes = self._pieces.cut(item.seq, item.start, item.start + item.num_tokens)
        return sum(sizes[: len(sizes) // 2]) or item.num_tokens // 2

    def fail(self, seq: Sequence, error: ManyloraError) -> None:
        """End a sequence and keep its error for `take_failed`."""
        self._failed.append((seq, error))
        self.finish(seq, FinishReason.ERROR)

    def charge_output(self, seq: Sequence, num_tokens: int) -> None:
        self.waiting.charge(seq, 0, num_tokens)

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence in whatever state it is, and give back all it holds."""
        if seq.is_finished:
            return
        if seq in self.running:
            self.running.remove(seq)
            self._release(seq)
        elif self._is_queued(seq):
            self.waiting.remove(seq)
            self._give_up(seq)
        self._forget_waiting(seq)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason = reason
        seq.finished_s = monotonic()
        if self._drafter is not None and seq.num_output_tokens and reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._drafter.keep(seq)
        seq.drafting = None
        seq.detokenizer = None
        seq.constraint = None
        seq.rules = None
        if seq.is_counted:
            seq.is_counted = False
            self.waiting.leave(seq.tenant)
        for follower in seq.followers:
            self.finish(follower, reason)
        seq.followers = []

    # admission

    def _admit(self, work: list[Scheduled], room: Room) -> None:
        not_ready: set[tuple[str, ...]] = set()  # ids of adapters that are not there together
        while room.has_any:
            seq = self._next_ready(not_ready)
            if seq is None:
                return
            try:
                if self._may_begin(seq, room) and self._make_seat(seq, work):
                    self._start(seq)
            finally:
                if seq.status is not SequenceStatus.RUNNING:
                    self.blocks.free(seq)
                    self._unacquire(seq)
            if seq.status is not SequenceStatus.RUNNING:
                return
            count = self._fits(seq, room)
            if count:
                self._add(work, room, seq, count)
                room.effort -= seq.num_encoded

    def _may_begin(self, seq: Sequence, room: Room) -> bool:
        """Whether what has to run at once of a sequence has room in the step."""
        return (not self._runs_whole and self._pieces is None) or self._fits(seq, room) > 0

    def _fits(self, seq: Sequence, room: Room) -> int:
        """How many of the sequence's tokens run in what is left of the step."""
        count = room.fits(seq, self._num_copied(seq))
        return 0 if self._runs_whole and count < seq.num_uncomputed else count

    def _num_copied(self, seq: Sequence) -> int:
        """How many of the sequence's next tokens are virtual ones that need not run."""
        if seq.num_computed >= 0 or not seq.slots:
            return 0
        return max(0, self._num_kept(seq.slots[0]) - seq.num_virtual - seq.num_computed)

    def _add(self, work: list[Scheduled], room: Room, seq: Sequence, count: int) -> None:
        num_copied = self._num_copied(seq)
        work.append(Scheduled(seq, seq.num_computed, count, num_copied=num_copied))
        if seq.snapshots:
            self.blocks.reserve_snapshots(seq, seq.num_computed + count)
        room.take(seq, count, num_copied)

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
        self._turns.start(seq)
        if not seq.num_charged:
            seq.num_charged = seq.num_prompt_tokens
            seq.num_cached_tokens = max(0, seq.num_computed)
            self.waiting.charge(seq, seq.num_uncomputed - self._num_copied(seq) + seq.num_encoded, 0)

    def _is_meant(self, seq: Sequence) -> bool:
        return self._only is None or seq in self._only

    def _next_ready(self, not_ready: set[tuple[str, ...]]) -> Sequence | None:
        """The next sequence to serve, its adapters' slots acquired; None when nobody can go on."""
        for tenant in self.waiting.tenants():
            for seq in list(islice(self.waiting.of(tenant), LOOK_AHEAD)):
                if not self._is_meant(seq):
                    continue
                if not seq.mix.parts:
                    return seq
                if seq.mix.ids in not_ready:
                    continue
                try:
                    ready = self._acquire(seq)
                except ManyloraError as error:
                    self.fail(seq, error)
                    continue
                if ready:
                    return seq
                not_ready.add(seq.mix.ids)
        gathered = self._slots.gathered
        if gathered and gathered not in not_ready:  # for one too far behind to be asked: it would keep all others out
            self._slots.stop_gathering()
        return None

    def _acquire(self, seq: Sequence) -> bool:
        if not self._turns.may_ask(seq):
            return False
        refs = seq.mix.refs
        slots: tuple[int, ...] | None
        if len(refs) == 1:
            slot = self._slots.acquire(refs[0], seq.tenant)
            slots = None if slot is None else (slot,)
        else:
            slots = self._slots.acquire_all(refs, seq.tenant)
        if slots is not None:
            seq.slots = slots
            return True
        if seq.status is not SequenceStatus.LOADING_ADAPTER:
            seq.status = SequenceStatus.LOADING_ADAPTER
            self.num_waiting_for_adapter += 1
            if seq.load_started_s is None:
                seq.load_started_s = monotonic()
        self._turns.pass_over(seq, may_lack=len(refs) == 1 or self._slots.gathered == seq.mix.ids)
        return False

    def _unacquire(self, seq: Sequence) -> None:
        slots, seq.slots = seq.slots, ()  # before they are let go of: whatever that raises, nobody may do it once more
        if slots:
            for ref in seq.mix.refs:
                self._slots.release(ref)

    def _give_up(self, seq: Sequence) -> None:
        """Let a sequence wait no more: for its adapters neither, unless others want them."""
        gathered = self._slots.gathered
        if gathered and gathered == seq.mix.ids and not any(s.mix.ids == gathered for s in self.waiting):
            self._slots.stop_gathering()
        for ref in seq.mix.refs:
            if not any(ref in s.mix.refs for s in self.waiting):
                self._slots.give_up(ref)

    def _take_turns(self, work: list[Scheduled]) -> None:
        chosen = self._turns.choose()
        if chosen is not None:
            for seq in [s for s in reversed(self.running) if any(ref.id == chosen for ref in s.mix.refs)]:
                self._preempt(seq, work)

    # drafts

    def _with_draft(self, item: Scheduled, room: Room, drafter: Drafter, num_rows: int) -> Scheduled:
        """The item with what the drafter proposes for it, as far as that takes nothing from anybody."""
        seq = item.seq
        most = min(seq.max_num_tokens - seq.num_tokens - 1, room.tokens, room.prompt_logits)
        if most <= 0 or not item.samples or seq.scores_prompt:
            return item
        if seq.constraint is not None and (num_rows > _LOOKING_ROWS or not seq.constraint.may_look):
            return item
        draft = tuple(drafter.propose(seq, most, num_rows))[:most]
        if not draft or not self.blocks.allocate(seq, seq.num_tokens + len(draft)):
            return item
        if seq.constraint is not None:
            seq.constraint.look(draft)
        room.tokens -= len(draft)
        room.prompt_logits -= len(draft)
        return Scheduled(seq, item.start, item.num_tokens, draft)

    # room

    def _make_seat(self, seq: Sequence, work: list[Scheduled]) -> bool:
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
        """Whom to preempt: of the tenant that runs most for its weight, the latest of those with the last priority."""
        running, weights = self._shares()
        tenant = max(running, key=lambda t: running[t] / weights[t])
        return _last([seq for seq in self.running if seq.tenant == tenant])

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
        """The last of the tenant that holds most blocks for its `share`. A tenant's only one has its turn first."""
        held = Counter[str]()
        for each in self.running:
            held[each.tenant] += len(each.block_table)
        if held[seq.tenant] + self.blocks.blocks_needed(seq, seq.num_tokens) > share[seq.tenant]:
            return None
        tenant = max(held, key=lambda t: held[t] / share[t])
        if tenant == seq.tenant or held[tenant] <= share[tenant]:
            return None
        theirs = [each for each in self.running if each.tenant == tenant]
        return _last(theirs) if len(theirs) > 1 or self._turns.has_had_turn(theirs[-1]) else None

    def _preempt(self, seq: Sequence, work: list[Scheduled]) -> int:
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
        item = next((each for each in work if each.seq is seq), None)
        if item is None:
            return 0
        work.remove(item)
        return item.num_tokens - item.num_virtual

    def _release(self, seq: Sequence) -> None:
        self.blocks.free(seq)
        self._turns.stop(seq)
        self._unacquire(seq)

    # housekeeping

    def _is_queued(self, seq: Sequence) -> bool:
        return seq in self.waiting.of(seq.tenant)

    def _forget_waiting(self, seq: Sequence) -> None:
        self.num_waiting_for_adapter -= seq.status is SequenceStatus.LOADING_ADAPTER
        self._turns.forget_waiting(seq)

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
            assert len(seq.slots) == len(seq.mix.parts)
        for seq in self.waiting:
            assert seq.status in (SequenceStatus.WAITING, SequenceStatus.LOADING_ADAPTER, SequenceStatus.PREEMPTED)
            assert not seq.block_table
            assert not seq.slots
        loading = [s for s in self.waiting if s.status is SequenceStatus.LOADING_ADAPTER]
        assert self.num_waiting_for_adapter == len(loading)
        self._turns.check_integrity()


def _last(seqs: list[Sequence]) -> Sequence:
    """Of one tenant's, in the order of their admission: the latest of those whose priority comes last."""
    return max(reversed(seqs), key=lambda seq: seq.priority)
