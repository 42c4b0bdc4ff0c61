"""Who waits for a place: in line, at no cost, and without pushing each other out."""

import threading

import pytest

from manylora.errors import AdapterLoadFailed, Conflict
from manylora.lora.memory.packing import PackedAdapter
from manylora.lora.memory.slots import Place
from tests.lora.packed import random_packed
from tests.lora.tier_setup import PATIENCE_S, SHAPES, SMALL, Disk, Setup, ref


def _equal(number: int) -> tuple:  # type: ignore[type-arg]
    return random_packed({0: 8}, SHAPES, seed=number)


@pytest.fixture
def full() -> Setup:
    """Two slots, both in use, and no host tier: every load reads from disk."""
    setup = Setup(slots=2, host_bytes=0, disk=Disk(make=_equal))
    for number in (0, 1):
        setup.get(number)
    return setup


def test_while_everything_is_in_use_waiting_reads_nothing_twice(full: Setup) -> None:
    for _ in range(50):
        for number in range(2, 10):
            assert full.tiers.acquire(ref(number)) is None
        full.settle()
    assert max(full.disk.reads.count(number) for number in range(10)) <= 1
    full.tiers.close()


def test_one_freed_place_starts_one_load(full: Setup) -> None:
    for number in range(2, 10):
        full.tiers.acquire(ref(number))
    full.settle()
    before = len(full.disk.reads)
    full.tiers.release(ref(0))
    full.settle()
    assert len(full.disk.reads) == before + 1
    assert full.tiers.tier_of(ref(2)) == "device", "the first in line"
    full.tiers.close()


def test_what_was_brought_in_for_a_request_stays_until_it_is_taken(full: Setup) -> None:
    for number in (2, 3, 4):
        full.tiers.prefetch(ref(number))
    full.settle()
    full.tiers.release(ref(0))
    full.settle()
    for number in (3, 4):
        assert full.tiers.acquire(ref(number)) is None
    full.settle()
    assert full.tiers.tier_of(ref(2)) == "device"
    assert full.tiers.acquire(ref(2)) is not None
    full.tiers.close()


def test_what_nobody_waits_for_any_more_makes_room(full: Setup) -> None:
    full.tiers.prefetch(ref(2))
    full.settle()
    full.tiers.prefetch(ref(3))
    full.tiers.release(ref(0))
    full.settle()
    assert full.tiers.tier_of(ref(2)) == "device"
    full.tiers.give_up(ref(2))
    full.settle()
    assert full.tiers.tier_of(ref(3)) == "device"
    full.tiers.close()


def test_who_is_hurried_gets_the_next_place_whoever_came_before(full: Setup) -> None:
    for number in range(2, 6):
        full.tiers.acquire(ref(number))
    full.settle()
    assert full.tiers.lacks_room(ref(5))
    full.tiers.hurry(ref(5))
    full.tiers.prefetch(ref(6))
    full.tiers.release(ref(1))
    full.settle()
    assert full.tiers.tier_of(ref(5)) == "device"
    assert full.holds(5, full.get(5))
    full.tiers.release(ref(0))
    full.settle()
    assert full.tiers.tier_of(ref(2)) == "device", "then the line goes on"
    full.tiers.close()


def test_who_is_hurried_may_take_a_place_kept_for_a_request_that_waits(full: Setup) -> None:
    full.tiers.prefetch(ref(2))
    full.settle()
    full.tiers.release(ref(0))
    full.settle()
    full.tiers.prefetch(ref(3))
    full.settle()
    assert full.tiers.tier_of(ref(2)) == "device"
    full.tiers.hurry(ref(3))
    full.settle()
    assert full.tiers.tier_of(ref(3)) == "device"
    assert full.tiers.tier_of(ref(2)) == "disk"
    full.tiers.close()


def test_a_hurried_one_that_gives_up_lets_the_line_go_on(full: Setup) -> None:
    for number in (2, 3):
        full.tiers.acquire(ref(number))
    full.settle()
    full.tiers.hurry(ref(3))
    full.tiers.give_up(ref(3))
    full.tiers.release(ref(0))
    full.settle()
    assert full.tiers.tier_of(ref(2)) == "device"
    full.tiers.close()


def test_waiting_adapters_do_not_push_each_other_out_of_host_memory() -> None:
    setup = Setup(slots=2, host_bytes=4 * SMALL, disk=Disk(make=_equal))
    for number in (0, 1):
        setup.get(number)
    for number in range(2, 12):
        assert setup.tiers.acquire(ref(number)) is None
    setup.settle()
    on_host = [n for n in range(12) if setup.tiers.tier_of(ref(n)) == "host"]
    assert on_host == [2, 3, 4, 5]
    for number in range(2, 12):
        setup.tiers.release(ref(number - 2))
        assert setup.holds(number, setup.get(number))
    setup.tiers.close()


def test_more_pins_than_leave_a_slot_for_others_are_a_conflict() -> None:
    setup = Setup(slots=3)
    for number in (0, 1):
        setup.tiers.set_pinned(ref(number), True)
    with pytest.raises(Conflict, match="no room on the device"):
        setup.tiers.set_pinned(ref(2), True)
    setup.tiers.set_pinned(ref(0), True)
    setup.settle()
    setup.use(3)
    setup.tiers.set_pinned(ref(1), False)
    setup.tiers.set_pinned(ref(2), True)
    setup.settle()
    assert "id-1" not in [r["id"] for r in setup.tiers.residents() if r["pinned"]]
    setup.tiers.close()


def test_an_adapter_for_which_pins_leave_no_bytes_fails_instead_of_waiting_for_ever() -> None:
    setup = Setup(slots=8, device_bytes=2 * SMALL, disk=Disk(make=_equal))
    for number in (0, 1):
        setup.tiers.set_pinned(ref(number), True)
    setup.settle()
    with pytest.raises(AdapterLoadFailed, match="pinned adapters leave no room"):
        setup.get(2)
    setup.tiers.set_pinned(ref(0), False)
    assert setup.holds(2, setup.get(2))
    setup.tiers.close()


def test_one_in_a_hurry_takes_what_was_being_filled_when_it_found_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(slots=1, threads=4)
    is_filling, go_on = threading.Event(), threading.Event()
    fill = setup.memory.fill

    def waiting(place: Place, packed: PackedAdapter) -> None:
        is_filling.set()
        assert go_on.wait(PATIENCE_S)
        fill(place, packed)

    monkeypatch.setattr(setup.memory, "fill", waiting)
    setup.tiers.prefetch(ref(0))
    assert is_filling.wait(PATIENCE_S)
    setup.tiers.prefetch(ref(1))
    setup.tiers.hurry(ref(1))
    while not setup.tiers.lacks_room(ref(1)):
        assert setup.changed.wait(PATIENCE_S)
        setup.changed.clear()
    go_on.set()
    assert setup.holds(1, setup.get(1))
    setup.tiers.close()
