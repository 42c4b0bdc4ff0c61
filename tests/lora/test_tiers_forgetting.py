"""A deleted adapter's users finish, then its memory is free; what nobody wants leaves nothing behind."""

import threading
from dataclasses import replace

import pytest

from manylora.errors import AdapterLoadFailed
from tests.lora.tier_setup import PATIENCE_S, SMALL, Setup, ref


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
    assert not len(setup.tiers._waiting)
    assert len(setup.tiers._device._policy._priority) == setup.book.num_used
    setup.tiers.close()


def test_an_heir_of_the_same_content_takes_over_what_the_host_holds(setup: Setup) -> None:
    heir = replace(ref(0), id="id-0-published", version=2)
    setup.use(0)
    assert setup.tiers.forget(ref(0), timeout_s=PATIENCE_S, heir=heir)
    assert (setup.tiers.tier_of(ref(0)), setup.tiers.tier_of(heir)) == ("disk", "host")
    setup.tiers.check_integrity()
    slot = None
    while (slot := setup.tiers.acquire(heir)) is None:
        assert setup.changed.wait(PATIENCE_S)
        setup.changed.clear()
    assert setup.holds(0, slot)
    assert setup.disk.reads == [0]


def test_an_heir_of_another_content_takes_over_nothing(setup: Setup) -> None:
    heir = replace(ref(0), id="id-0-other", digest="another")
    setup.use(0)
    assert setup.tiers.forget(ref(0), timeout_s=PATIENCE_S, heir=heir)
    assert (setup.tiers.tier_of(ref(0)), setup.tiers.tier_of(heir)) == ("disk", "disk")
    assert setup.tiers.host_bytes == 0


def test_an_heir_that_is_there_already_is_counted_once(setup: Setup) -> None:
    setup.use(0)
    setup.use(1)
    heir = replace(ref(1), digest="digest-0")
    assert setup.tiers.forget(ref(0), timeout_s=PATIENCE_S, heir=heir)
    assert setup.tiers.forget(ref(9), timeout_s=PATIENCE_S, heir=heir)
    setup.tiers.check_integrity()
