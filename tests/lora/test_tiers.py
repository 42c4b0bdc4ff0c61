"""Adapters come and go between the tiers, and nobody loses the one they use."""

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from manylora.errors import AdapterLoadFailed, InvalidAdapter, Problem
from manylora.lora.kernels.reference import LowRank
from manylora.lora.memory import DeviceMemory
from manylora.lora.packing import PackedAdapter
from manylora.lora.ref import AdapterRef, Tier
from manylora.lora.slots import SlotBook
from manylora.lora.tiers import AdapterTiers, TierEvents
from tests.lora.packed import random_packed

SHAPES = {0: (16, 16), 1: (16, 32)}
RANKS = ({0: 8}, {0: 8}, {0: 16, 1: 8}, {1: 4})
SMALL = random_packed({0: 8}, SHAPES)[0].size_bytes
PATIENCE_S = 20.0


def ref(number: int) -> AdapterRef:
    return AdapterRef(f"id-{number}", "tenant", f"adapter-{number}", 1, f"digest-{number}")


def weights(number: int) -> tuple[PackedAdapter, dict[int, LowRank]]:
    return random_packed(RANKS[number % len(RANKS)], SHAPES, seed=number)


class Recorder(TierEvents):
    """Counts what the tiers report."""

    def __init__(self) -> None:
        self.loads: list[Tier] = []
        self.evictions: list[Tier] = []

    def on_load(self, tier: Tier, seconds: float) -> None:
        assert seconds >= 0
        self.loads.append(tier)

    def on_eviction(self, tier: Tier) -> None:
        self.evictions.append(tier)


@dataclass
class Disk:
    """What the loader finds: adapter N in folder N, as long as nothing is `broken`, and when `gate` is open."""

    broken: dict[int, Exception] = field(default_factory=dict)
    gate: threading.Event = field(default_factory=threading.Event)
    reads: list[int] = field(default_factory=list)
    make: Callable[[int], tuple[PackedAdapter, dict[int, LowRank]]] = weights

    def __post_init__(self) -> None:
        self.gate.set()

    def pack(self, folder: Path) -> PackedAdapter:
        assert self.gate.wait(PATIENCE_S)
        number = int(folder.name)
        self.reads.append(number)
        if number in self.broken:
            raise self.broken[number]
        return self.make(number)[0]


class Setup:
    """Tiers over real slots and memory, and a disk that can be made to fail."""

    def __init__(
        self,
        *,
        slots: int = 4,
        device_bytes: int = 2**20,
        host_bytes: int = 2**20,
        places_per_slab: int = 1,
        threads: int = 1,
        disk: Disk | None = None,
    ) -> None:
        self.disk = disk or Disk()
        self.events = Recorder()
        self.changed = threading.Event()
        self.book = SlotBook(slots, device_bytes, 4, places_per_slab)
        self.memory = DeviceMemory(len(SHAPES), slots, torch.float32, torch.device("cpu"))
        self.tiers = AdapterTiers(
            self.book,
            self.memory,
            host_bytes=host_bytes,
            folder_of=lambda r: Path(r.id.removeprefix("id-")),
            packer=self.disk.pack,
            on_change=self.changed.set,
            events=self.events,
            num_threads=threads,
        )

    def get(self, number: int) -> int:
        """The slot, as the engine gets it: asking again whenever something has changed."""
        while True:
            slot = self.tiers.acquire(ref(number))
            if slot is not None:
                return slot
            assert self.changed.wait(PATIENCE_S)
            self.changed.clear()

    def use(self, number: int) -> None:
        self.get(number)
        self.tiers.release(ref(number))

    def settle(self) -> None:
        """Wait until nothing is being loaded."""
        while any(e.is_loading for e in list(self.tiers._entries.values())):
            assert self.changed.wait(PATIENCE_S)
            self.changed.clear()
        self.tiers.check_integrity()

    def holds(self, number: int, slot: int) -> bool:
        """The slot has this adapter's weights and no others."""
        pairs = self.disk.make(number)[1]
        for site in SHAPES:
            found = self.memory.matrices(slot, site)
            if (found is None) != (site not in pairs):
                return False
            if found is not None and not (
                torch.equal(found[0], pairs[site].a) and torch.equal(found[1], pairs[site].b)
            ):
                return False
        return True


@pytest.fixture
def setup() -> Iterator[Setup]:
    made = Setup()
    yield made
    made.tiers.check_integrity()
    made.tiers.close()


def test_first_answer_is_not_yet_and_the_load_runs_on_its_own_thread(setup: Setup) -> None:
    setup.disk.gate.clear()
    assert setup.tiers.acquire(ref(0)) is None
    assert setup.tiers.tier_of(ref(0)) == "disk"
    setup.disk.gate.set()
    slot = setup.get(0)
    assert setup.holds(0, slot)
    assert setup.tiers.tier_of(ref(0)) == "device"
    assert setup.events.loads == ["disk", "host"]


def test_asking_many_times_loads_once(setup: Setup) -> None:
    setup.disk.gate.clear()
    for _ in range(50):
        assert setup.tiers.acquire(ref(0)) is None
        setup.tiers.prefetch(ref(0))
    setup.disk.gate.set()
    setup.get(0)
    setup.settle()
    assert setup.disk.reads == [0]


def test_prefetch_brings_it_in_without_a_user(setup: Setup) -> None:
    setup.tiers.prefetch(ref(0))
    setup.settle()
    assert [r["users"] for r in setup.tiers.residents()] == [0]
    assert setup.tiers.acquire(ref(0)) is not None


def test_a_full_device_evicts_the_idle_one(setup: Setup) -> None:
    held = {n: setup.get(n) for n in range(3)}
    setup.use(3)
    slot = setup.get(4)
    assert slot not in held.values()
    assert setup.tiers.tier_of(ref(3)) == "host"
    assert all(setup.holds(n, s) for n, s in held.items())
    assert setup.events.evictions == ["device"]


def test_while_all_are_in_use_the_next_one_waits_until_a_slot_falls_free(setup: Setup) -> None:
    for n in range(4):
        setup.get(n)
    assert setup.tiers.acquire(ref(4)) is None
    setup.settle()
    assert setup.tiers.acquire(ref(4)) is None
    setup.settle()
    setup.tiers.release(ref(2))
    assert setup.holds(4, setup.get(4))
    assert setup.tiers.tier_of(ref(2)) == "host"
    assert setup.disk.reads.count(4) == 1, "the host kept it while it waited"


def test_pinned_adapters_stay(setup: Setup) -> None:
    for n in range(3):
        setup.tiers.set_pinned(ref(n), True)
    setup.settle()
    for n in range(3, 20):
        setup.use(n)
    assert all(setup.tiers.tier_of(ref(n)) == "device" for n in range(3))
    setup.tiers.set_pinned(ref(0), False)
    for n in range(20, 30):
        setup.get(n) if n == 20 else setup.use(n)
    assert setup.tiers.tier_of(ref(0)) != "device"


def test_an_evicted_adapter_comes_back_with_the_same_bits(setup: Setup) -> None:
    for _ in range(3):
        for n in range(9):
            slot = setup.get(n)
            assert setup.holds(n, slot)
            setup.tiers.release(ref(n))


def test_host_tier_keeps_the_latest_within_its_budget() -> None:
    setup = Setup(slots=1, host_bytes=2 * SMALL, disk=Disk(make=lambda n: random_packed({0: 8}, SHAPES, seed=n)))
    for n in (0, 1, 0, 2):  # the device holds one, so 0 is asked of the host again before 2 comes
        setup.use(n)
        setup.tiers.check_integrity()
    assert [setup.tiers.tier_of(ref(n)) for n in range(3)] == ["host", "disk", "device"]
    assert setup.disk.reads == [0, 1, 2]
    assert setup.events.evictions.count("host") == 1
    assert setup.tiers.host_bytes == 2 * SMALL
    setup.tiers.close()


def test_without_a_host_tier_every_return_is_read_from_disk() -> None:
    setup = Setup(slots=1, host_bytes=0)
    for n in (0, 1, 0):
        assert setup.holds(n, setup.get(n))
        setup.tiers.release(ref(n))
    assert setup.disk.reads == [0, 1, 0]
    assert setup.tiers.host_bytes == 0
    setup.tiers.close()


# what goes wrong


@pytest.mark.parametrize(
    "error", [OSError("disk on fire"), ValueError("bad"), KeyError("k"), RuntimeError("r"), MemoryError("full")]
)
def test_a_failed_load_reaches_who_asked_once_and_can_be_tried_again(setup: Setup, error: Exception) -> None:
    setup.disk.broken[0] = error
    with pytest.raises(AdapterLoadFailed, match="adapter-0@1 could not be loaded"):
        setup.get(0)
    assert setup.tiers.tier_of(ref(0)) == "disk"
    del setup.disk.broken[0]
    assert setup.holds(0, setup.get(0))


def test_our_own_errors_arrive_as_they_are(setup: Setup) -> None:
    setup.disk.broken[0] = InvalidAdapter([Problem("not_finite", "x", "It holds NaN.")])
    with pytest.raises(InvalidAdapter):
        setup.get(0)


def test_a_failed_load_harms_no_other(setup: Setup) -> None:
    setup.disk.broken[1] = OSError("gone")
    setup.tiers.prefetch(ref(1))
    slot = setup.get(0)
    assert setup.holds(0, slot)
    setup.settle()
    assert len(setup.tiers.residents()) == 1


def test_an_error_of_yesterday_is_not_told_once_the_adapter_is_there(setup: Setup) -> None:
    setup.disk.broken[0] = OSError("for a moment")
    setup.tiers.prefetch(ref(0))
    setup.settle()
    setup.disk.broken.clear()
    setup.tiers.prefetch(ref(0))
    setup.settle()
    assert setup.tiers.acquire(ref(0)) is not None


def test_an_adapter_larger_than_the_device_is_refused_by_name_and_size() -> None:
    setup = Setup(device_bytes=SMALL)
    with pytest.raises(AdapterLoadFailed, match=f"whole budget is {SMALL}: raise --adapter-memory"):
        setup.get(2)
    setup.get(0)
    setup.tiers.check_integrity()
    setup.tiers.close()


@pytest.mark.parametrize("operation", ["allocate", "fill"])
@pytest.mark.parametrize("places_per_slab", [1, 3])
def test_memory_that_runs_out_on_the_way_gives_the_place_back(
    operation: str, places_per_slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(slots=2, places_per_slab=places_per_slab)
    with monkeypatch.context() as patch:

        def out_of_memory(*_: object) -> None:
            raise RuntimeError("out of memory")

        patch.setattr(setup.memory, operation, out_of_memory)
        for _ in range(5):
            with pytest.raises(AdapterLoadFailed, match="out of memory"):
                setup.get(0)
            setup.settle()
    assert setup.book.num_used == 0
    assert not setup.memory.slabs
    for n in (0, 1):
        assert setup.holds(n, setup.get(n))
    setup.tiers.check_integrity()
    setup.tiers.close()


def test_releasing_more_often_than_acquiring_is_our_own_mistake(setup: Setup) -> None:
    setup.use(0)
    with pytest.raises(AssertionError, match="released more often"):
        setup.tiers.release(ref(0))


# forgetting


def test_forget_waits_for_the_last_user_and_frees_everything(setup: Setup) -> None:
    setup.get(0)
    setup.get(0)
    done = threading.Event()

    def forget() -> None:
        setup.tiers.forget(ref(0))
        done.set()

    thread = threading.Thread(target=forget)
    thread.start()
    setup.tiers.release(ref(0))
    assert not done.wait(0.05)
    assert setup.tiers.tier_of(ref(0)) == "device"
    setup.tiers.release(ref(0))
    assert done.wait(PATIENCE_S)
    thread.join()
    assert setup.tiers.tier_of(ref(0)) == "disk"
    assert setup.book.num_used == 0
    assert setup.tiers.host_bytes == 0
    assert not setup.tiers._entries


def test_forget_waits_for_a_load_that_is_under_way(setup: Setup) -> None:
    setup.disk.gate.clear()
    setup.tiers.prefetch(ref(0))
    assert not setup.tiers.forget(ref(0), timeout_s=0.02)
    setup.disk.gate.set()
    assert setup.tiers.forget(ref(0), timeout_s=PATIENCE_S)
    assert setup.book.num_used == 0
    assert setup.tiers.host_bytes == 0


def test_forget_frees_a_pinned_one_too(setup: Setup) -> None:
    setup.tiers.set_pinned(ref(0), True)
    setup.settle()
    assert setup.tiers.forget(ref(0))
    assert not setup.tiers._entries


def test_forgetting_makes_room_for_who_waits(setup: Setup) -> None:
    for n in range(4):
        setup.get(n)
    assert setup.tiers.acquire(ref(7)) is None
    setup.settle()
    setup.tiers.release(ref(1))
    assert setup.tiers.forget(ref(1))
    assert setup.holds(7, setup.get(7))


def test_forgetting_what_only_the_host_knows(setup: Setup) -> None:
    for n in range(5):
        setup.use(n)
    gone = next(n for n in range(5) if setup.tiers.tier_of(ref(n)) == "host")
    assert setup.tiers.forget(ref(gone))
    assert setup.tiers.tier_of(ref(gone)) == "disk"


def test_given_up_adapters_are_loaded_no_more(setup: Setup) -> None:
    for n in range(4):
        setup.get(n)
    assert setup.tiers.acquire(ref(7)) is None
    setup.settle()
    setup.tiers.give_up(ref(7))
    setup.tiers.release(ref(0))
    setup.settle()
    assert setup.tiers.tier_of(ref(7)) == "host"
    assert setup.tiers.tier_of(ref(0)) == "device"


def test_thousands_of_adapters_leave_nothing_behind() -> None:
    setup = Setup(slots=4, host_bytes=4 * SMALL)
    for n in range(0, 2000, 2):
        setup.disk.broken[n] = OSError("gone")
    for n in range(2000):
        kind = n % 7
        if kind == 0:
            setup.tiers.prefetch(ref(n))
            setup.settle()
            setup.tiers.give_up(ref(n))
        elif kind == 1:
            setup.tiers.set_pinned(ref(n), True)
            setup.settle()
            setup.tiers.set_pinned(ref(n), False)
        elif n % 2:
            setup.use(n)
        else:
            with pytest.raises(AdapterLoadFailed):
                setup.get(n)
        setup.tiers.tier_of(ref(n))
    setup.settle()
    assert len(setup.tiers._entries) <= 4
    assert len(setup.tiers._host) <= 4
    assert not setup.tiers._wanted
    assert len(setup.tiers._policy._priority) == setup.book.num_used
    setup.tiers.close()


def test_an_offered_folder_is_used_until_it_is_taken_back(setup: Setup) -> None:
    setup.tiers.offer(ref(0), Path("/quarantine/2"))
    assert setup.holds(2, setup.get(0))
    setup.tiers.release(ref(0))
    setup.tiers.offer(ref(0), None)
    assert setup.tiers.forget(ref(0))
    assert setup.holds(0, setup.get(0))


def test_residents_say_who_sits_where(setup: Setup) -> None:
    slot = setup.get(3)
    setup.tiers.set_pinned(ref(3), True)
    size = weights(3)[0].size_bytes
    assert setup.tiers.residents() == [
        {
            "slot": slot,
            "id": "id-3",
            "tenant": "tenant",
            "name": "adapter-3",
            "version": 1,
            "size_bytes": size,
            "users": 1,
            "pinned": True,
        }
    ]


# any order of calls


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
        self.setup.tiers.set_pinned(ref(number), pinned)
        (self.pinned.add if pinned else self.pinned.discard)(number)

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
        assert tiers._policy._priority.keys() == {r["id"] for r in tiers.residents()}
        tiers._policy.check_integrity()
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
        assert not tiers._wanted
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
