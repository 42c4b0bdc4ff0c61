"""Whose adapter is in a slot, when more are asked for than have one: they take turns.

An adapter that has run for a while yields to one that waits, soonest where that has had no token yet, and comes back in
its turn. Its sequences find most of their blocks in the prefix cache. So the time to a first token does not grow with
the answers of others. Bookkeeping only; whom it chooses is preempted by the scheduler.
"""

from collections import Counter
from typing import Final, Protocol

from manylora.engine.fairness import FairQueue
from manylora.engine.interface import AdapterRef
from manylora.engine.sequence import Sequence

TURN_STEPS: Final = 16  # what an adapter may run, for each of its sequences, before it yields to one without a place
FIRST_TURN_STEPS: Final = 4  # the same, where who waits has had no token yet
LONGEST_TURN_STEPS: Final = 128  # however many sequences it has
HEAD_START_STEPS: Final = 64  # by how much a first token is more urgent than a later one, in steps of waiting
GRANT_STEPS: Final = 8  # how long a place that was given up may take to reach who waits, before another one is


class Places(Protocol):
    """The part of `lora.memory.tiers.AdapterTiers` that turns need."""

    def lacks_room(self, ref: AdapterRef) -> bool: ...

    def hurry(self, ref: AdapterRef) -> None: ...

    def may_leave(self, ref: AdapterRef) -> bool: ...


class Turns:
    """Counts plans, and chooses the adapter that yields. `running` and `waiting` are the scheduler's own."""

    def __init__(self, running: list[Sequence], waiting: FairQueue, places: Places, max_num_seqs: int) -> None:
        self._running = running
        self._waiting = waiting
        self._places = places
        self._max_num_seqs = max_num_seqs
        self._num_plans = 0
        self._lacking: list[Sequence] = []  # of this plan: the first of each adapter that finds no place
        self._yielding: dict[str, Sequence] = {}  # adapter id -> the sequence it makes room for
        self._held_since: dict[str, int] = {}  # adapter id -> the plan since which it has run without a break

    def begin_plan(self) -> None:
        self._num_plans += 1
        self._lacking.clear()

    # what becomes of sequences

    def may_ask(self, seq: Sequence) -> bool:
        """Whether none of its adapters is making room for somebody else just now."""
        return all(self._yielding.get(ref.id, seq) is seq for ref in seq.mix.refs)

    def pass_over(self, seq: Sequence, *, may_lack: bool) -> None:
        """Note that `seq` could not go on in this plan, since an adapter of it has no slot.

        `may_lack`: others yield to it where it finds no place.
        """
        seq.num_passed_over += 1
        if may_lack and any(self._places.lacks_room(ref) for ref in seq.mix.refs):
            self._lacking.append(seq)

    def start(self, seq: Sequence) -> None:
        """Note that `seq` runs from this plan on."""
        seq.started_plan = self._num_plans
        for ref in seq.mix.refs:
            self._held_since.setdefault(ref.id, self._num_plans)

    def stop(self, seq: Sequence) -> None:
        """Note that `seq` runs no more: it was taken out of `running`."""
        for ref in seq.mix.refs:
            if not any(ref in s.mix.refs for s in self._running):
                del self._held_since[ref.id]

    def forget_waiting(self, seq: Sequence) -> None:
        """Note that `seq` waits no more."""
        seq.num_passed_over = 0
        seq.granted_plan = None
        for adapter_id in [a for a, s in self._yielding.items() if s is seq]:
            del self._yielding[adapter_id]

    def has_had_turn(self, seq: Sequence) -> bool:
        """A running sequence has run for as long as any may before others come."""
        return self._num_plans - seq.started_plan >= LONGEST_TURN_STEPS

    # who yields

    def choose(self) -> str | None:
        """The id of the adapter that yields now to the most urgent of those that find no place; None if none does."""
        lacking = [s for s in self._lacking if not self._is_granted(s)]
        if not lacking:
            return None
        held, share = self._places_held(lacking)
        at_share = {tenant for tenant, count in held.items() if count >= share}
        starving, turn_steps = self._most_urgent(lacking, at_share)
        if starving is None:
            return None
        yielding = at_share
        if starving.tenant in at_share:  # it takes turns with itself, and with who has more than that
            yielding = {starving.tenant} | {tenant for tenant, count in held.items() if count > share}
        chosen = self._who_yields(turn_steps, yielding)
        if chosen is not None:
            self._hurry(starving)
            starving.granted_plan = self._num_plans
            self._yielding[chosen] = starving
        elif not any(self._places.may_leave(ref) for s in self._running for ref in s.mix.refs):
            self._hurry(starving)  # into a place that is kept for another one that waits
        return chosen

    def _hurry(self, seq: Sequence) -> None:
        for ref in seq.mix.refs:
            self._places.hurry(ref)

    def _is_granted(self, seq: Sequence) -> bool:
        return seq.granted_plan is not None and self._num_plans - seq.granted_plan < GRANT_STEPS

    def _places_held(self, lacking: list[Sequence]) -> tuple[Counter[str], float]:
        """How many adapters each tenant runs, and how many would be an equal share of these for all who want some."""
        held = Counter(tenant for tenant, _ in {(s.tenant, ref.id) for s in self._running for ref in s.mix.refs})
        return held, held.total() / max(1, len(held.keys() | {s.tenant for s in lacking}))

    def _most_urgent(self, lacking: list[Sequence], at_share: set[str]) -> tuple[Sequence | None, int]:
        """Who has waited longest, new ones with a head start; and how long an adapter must have run to yield to it.

        Tenants that have their share of places already come last, however many of their adapters wait.
        A tenant begins no more requests than its share of seats: beyond, they would only slow each other down, and
        a new one waits for a place to fall free, or for an adapter that has run for very long.
        """
        begun = Counter(s.tenant for s in (*self._running, *self._waiting) if s.num_output_tokens)
        num_tenants = len({s.tenant for s in self._running} | set(self._waiting.tenants()))
        may_begin = {t for t in {s.tenant for s in lacking} if begun[t] * num_tenants < self._max_num_seqs}

        def urgency(seq: Sequence) -> int:
            return seq.num_passed_over + (0 if seq.num_output_tokens else HEAD_START_STEPS)

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
        refs: dict[str, AdapterRef] = {}
        for seq in self._running:
            for ref in seq.mix.refs:
                if ref.id not in self._yielding:
                    refs[ref.id] = ref
                    users.setdefault(ref.id, []).append(seq)
        theirs = {adapter_id: seqs for adapter_id, seqs in users.items() if all(s.tenant in tenants for s in seqs)}
        longest: tuple[float, str | None] = (0.0, None)
        for adapter_id, seqs in (theirs or users).items():
            steps = self._num_plans - self._held_since[adapter_id]
            turn = min(turn_steps * len(seqs), LONGEST_TURN_STEPS)
            has_begun = all(s.num_output_tokens for s in seqs) or steps >= LONGEST_TURN_STEPS
            if steps >= turn and has_begun and self._places.may_leave(refs[adapter_id]):
                longest = max(longest, (steps / len(seqs), adapter_id))
        return longest[1]

    def check_integrity(self) -> None:
        """Adapters are counted while they run, and nobody who runs is told apart as waiting."""
        assert self._held_since.keys() == {ref.id for s in self._running for ref in s.mix.refs}
        assert all(any(w is s for w in self._waiting) for s in self._yielding.values())
        assert not any(s.num_passed_over or s.granted_plan is not None for s in self._running)
