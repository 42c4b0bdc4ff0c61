"""Any order of calls, from one thread and from many."""

import random
import threading

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from manylora.errors import AdapterLoadFailed, Conflict
from tests.lora.tier_setup import PATIENCE_S, SMALL, Setup, ref


class Lives(RuleBasedStateMachine):
    """Every operation in any order; after each, loads are left to finish, so that what must hold is known."""

    numbers = st.integers(0, 9)

    def __init__(self) -> None:
        super().__init__()
        self.setup = Setup(slots=4, device_bytes=6 * SMALL, host_bytes=4 * SMALL, places_per_slab=2)
        self.users: dict[int, int] = {}
        self.slots: dict[int, int] = {}
        self.pinned: set[int] = set()

    @rule(number=numbers)
    def acquire(self, number: int) -> None:
        try:
            slot = self.setup.tiers.acquire(ref(number))
        except AdapterLoadFailed:
            assert not self.users.get(number)
            return
        self.setup.settle()
        if slot is None:
            assert not self.users.get(number)
        else:
            assert self.slots.get(number, slot) == slot or not self.users.get(number)
            self.users[number] = self.users.get(number, 0) + 1
            self.slots[number] = slot

    @precondition(lambda self: any(self.users.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(n for n, count in self.users.items() if count)))
        self.setup.tiers.release(ref(number))
        self.users[number] -= 1

    @rule(number=numbers)
    def prefetch(self, number: int) -> None:
        self.setup.tiers.prefetch(ref(number))

    @rule(number=numbers)
    def give_up(self, number: int) -> None:
        self.setup.tiers.give_up(ref(number))

    @rule(number=numbers, pinned=st.booleans())
    def pin(self, number: int, pinned: bool) -> None:
        try:
            self.setup.tiers.set_pinned(ref(number), pinned)
        except Conflict:
            assert pinned
            assert number not in self.pinned
            return
        (self.pinned.add if pinned else self.pinned.discard)(number)
        assert len(self.pinned) < 4

    @rule(number=numbers)
    def hurry(self, number: int) -> None:
        self.setup.tiers.hurry(ref(number))

    @rule(number=numbers)
    def forget(self, number: int) -> None:
        if not self.users.get(number):
            assert self.setup.tiers.forget(ref(number), timeout_s=PATIENCE_S)
            assert self.setup.tiers.tier_of(ref(number)) == "disk"
            self.pinned.discard(number)

    @rule(number=numbers)
    def break_or_mend(self, number: int) -> None:
        if self.setup.disk.broken.pop(number, None) is None:
            self.setup.disk.broken[number] = OSError("gone")

    @invariant()
    def books_are_kept_and_used_adapters_stay(self) -> None:
        self.setup.settle()
        tiers = self.setup.tiers
        in_use = {n: s for n, s in self.slots.items() if self.users.get(n)}
        assert len(set(in_use.values())) == len(in_use)
        for number, slot in in_use.items():
            assert tiers.tier_of(ref(number)) == "device"
            assert self.setup.holds(number, slot)
        assert {r["id"]: r["users"] for r in tiers.residents() if r["users"]} == {
            f"id-{n}": count for n, count in self.users.items() if count
        }
        assert tiers._device._policy._priority.keys() == {r["id"] for r in tiers.residents()}
        assert set(self.setup.memory.places) == {r["slot"] for r in tiers.residents()}

    def teardown(self) -> None:
        tiers = self.setup.tiers
        self.setup.settle()
        for number, count in self.users.items():
            for _ in range(count):
                tiers.release(ref(number))
        for number in range(10):
            assert tiers.forget(ref(number), timeout_s=PATIENCE_S)
        assert not tiers._entries
        assert not len(tiers._waiting)
        assert self.setup.book.num_used == self.setup.book.used_bytes == tiers.host_bytes == 0
        assert not self.setup.memory.slabs
        assert not self.setup.memory.tables.any()
        tiers.check_integrity()
        tiers.close()


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_many_threads_at_once_never_see_another_adapters_weights() -> None:
    setup = Setup(slots=5, device_bytes=8 * SMALL, host_bytes=4 * SMALL, places_per_slab=2, threads=3)
    faults: list[str] = []
    names = threading.Lock()
    gone: set[int] = set()

    def user(seed: int) -> None:
        rng = random.Random(seed)
        for turn in range(60):
            number = rng.randrange(12)
            for _ in range(2000):
                slot = setup.tiers.acquire(ref(number))
                if slot is not None:
                    break
                setup.changed.wait(0.002)
            else:
                setup.tiers.give_up(ref(number))
                continue
            if not setup.holds(number, slot):
                faults.append(f"slot {slot} does not hold adapter {number}")
            setup.tiers.check_integrity()
            setup.tiers.release(ref(number))
            if turn % 10 == 9:
                with names:
                    fresh = 1000 * (seed + 1) + turn
                    gone.add(fresh)
                setup.tiers.prefetch(ref(fresh))
                setup.tiers.forget(ref(fresh), timeout_s=PATIENCE_S)

    threads = [threading.Thread(target=user, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(6 * PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads)
    assert not faults
    setup.settle()
    assert {setup.tiers.tier_of(ref(n)) for n in gone} == {"disk"}
    assert all(not r["users"] for r in setup.tiers.residents())
    setup.tiers.close()
