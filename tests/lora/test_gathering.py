"""Several adapters that are asked for together get places together, or their askers hear that they never will."""

import threading
from collections.abc import Callable, Collection

import pytest

from manylora.engine.build import NUM_LOADERS
from manylora.errors import AdapterLoadFailed
from tests.lora.tier_setup import PATIENCE_S, SMALL, Setup, ref

NO_ROOM = "pinned adapters and the others of the request leave no room"


def ask(setup: Setup, *numbers: int) -> tuple[int, ...] | None:
    return setup.tiers.acquire_all([ref(number) for number in numbers])


def ask_till(setup: Setup, is_done: Callable[[tuple[int, ...] | None], bool], *numbers: int) -> None:
    """Ask as the engine does, again whenever something has changed."""
    while not is_done(ask(setup, *numbers)):
        assert setup.changed.wait(PATIENCE_S)
        setup.changed.clear()
        setup.tiers.check_integrity()


def get(setup: Setup, *numbers: int, is_hurried: bool = False) -> None:
    """`is_hurried`: as the engine hurries those for which nobody's turn would end."""

    def is_done(slots: tuple[int, ...] | None) -> bool:
        for number in numbers if is_hurried and slots is None else ():
            setup.tiers.hurry(ref(number))
        return slots is not None

    ask_till(setup, is_done, *numbers)


def let_go(setup: Setup, *numbers: int) -> None:
    for number in numbers:
        setup.tiers.release(ref(number))


def check_nothing_is_kept(setup: Setup, besides: Collection[str] = ()) -> None:
    setup.settle()
    assert setup.tiers.gathered == ()
    assert {row["id"] for row in setup.tiers.residents() if row["users"]} == set(besides)


@pytest.mark.parametrize("host_bytes", [0, 2**20])
def test_pins_and_the_others_leave_no_room(host_bytes: int) -> None:
    """After one was refused already: nothing stays behind, and who wants a part of it alone does not hear of it."""
    setup = Setup(slots=2, host_bytes=host_bytes)
    setup.tiers.set_pinned(ref(0), True)
    setup.get(4)
    setup.tiers.prefetch(ref(1))
    setup.settle()
    setup.tiers.release(ref(4))
    with pytest.raises(AdapterLoadFailed, match=NO_ROOM):
        get(setup, 1, 5)
    check_nothing_is_kept(setup)
    for number in (5, 1, 4):
        assert setup.holds(number, setup.get(number))
        let_go(setup, number)
    get(setup, 0, 5)
    let_go(setup, 0, 5)
    check_nothing_is_kept(setup)
    setup.tiers.close()


@pytest.mark.parametrize("host_bytes", [0, 2**20])
def test_adapters_that_are_larger_together_than_the_memory(host_bytes: int) -> None:
    setup = Setup(slots=4, device_bytes=2 * SMALL, host_bytes=host_bytes)
    with pytest.raises(AdapterLoadFailed, match=NO_ROOM):
        get(setup, 0, 1, 4)
    check_nothing_is_kept(setup)
    get(setup, 4, 1)
    let_go(setup, 1)
    assert setup.holds(5, setup.get(5))
    setup.tiers.close()


def test_who_wants_one_of_them_alone_does_not_hear_that_all_have_no_room() -> None:
    setup = Setup(slots=1)
    setup.use(4)
    setup.tiers.prefetch(ref(1))
    setup.settle()
    ask_till(setup, lambda _: bool(setup.tiers.gathered), 0, 1)
    setup.settle()
    lacking = next(number for number in (0, 1) if setup.tiers.lacks_room(ref(number)))
    assert setup.tiers.acquire(ref(lacking)) is None
    with pytest.raises(AdapterLoadFailed, match=NO_ROOM):
        ask(setup, 0, 1)
    assert setup.holds(lacking, setup.get(lacking))
    setup.tiers.close()


def test_no_room_is_not_told_where_a_pin_has_gone_meanwhile() -> None:
    setup = Setup(slots=2)
    setup.tiers.set_pinned(ref(5), True)
    setup.settle()
    ask_till(setup, lambda _: bool(setup.tiers.gathered), 0, 1)
    setup.settle()
    setup.tiers.set_pinned(ref(5), False)
    get(setup, 0, 1)
    let_go(setup, 0, 1)
    check_nothing_is_kept(setup)
    setup.tiers.close()


def test_no_room_is_not_told_where_a_pinned_one_is_about_to_be_deleted() -> None:
    """It is in use still, and waited for."""
    setup = Setup(slots=2)
    setup.get(5)
    setup.tiers.set_pinned(ref(5), True)
    ask_till(setup, lambda _: bool(setup.tiers.gathered), 0, 1)
    setup.settle()
    assert not setup.tiers.forget(ref(5), 0)
    assert ask(setup, 0, 1) is None
    setup.tiers.release(ref(5))
    assert setup.tiers.forget(ref(5), PATIENCE_S)
    get(setup, 0, 1)
    setup.tiers.close()


def test_what_is_not_read_ahead_waits_for_nothing_but_a_place_at_once() -> None:
    """Host memory has no room for it, so no load's end tells anybody to ask again."""
    setup = Setup(slots=2, host_bytes=0)
    setup.get(4)
    setup.get(5)
    assert ask(setup, 4, 1) is None
    assert setup.tiers.gathered == ("id-4", "id-1")
    setup.tiers.close()


def test_one_that_waits_in_more_of_a_hurry_keeps_nobody_from_hearing_it() -> None:
    setup = Setup(slots=2)
    setup.tiers.set_pinned(ref(0), True)
    setup.get(4)
    for number in (1, 5, 8):
        setup.tiers.prefetch(ref(number))
    setup.settle()
    assert ask(setup, 4, 1) is None
    assert setup.tiers.gathered == ("id-4", "id-1")
    setup.tiers.hurry(ref(8))
    setup.tiers.release(ref(4))
    with pytest.raises(AdapterLoadFailed, match=NO_ROOM):
        get(setup, 4, 1)
    assert setup.holds(8, setup.get(8))
    check_nothing_is_kept(setup, besides={"id-8"})
    setup.tiers.close()


def test_a_place_that_falls_free_while_another_is_read_is_taken_and_fails_nobody() -> None:
    """One was refused before, and all that has a place then is of its own group."""
    setup = Setup(slots=2, host_bytes=0, threads=NUM_LOADERS)
    setup.get(5)
    setup.get(1)
    for number in (6, 7):
        setup.tiers.prefetch(ref(number))
    setup.settle()
    assert ask(setup, 5, 6) is None
    assert setup.tiers.gathered == ("id-5", "id-6")
    setup.disk.slow |= {6: threading.Event(), 7: threading.Event()}
    setup.tiers.hurry(ref(7))
    setup.tiers.release(ref(1))
    setup.tiers.forget(ref(1))
    assert ask(setup, 5, 6) is None
    for event in setup.disk.slow.values():
        event.set()
    setup.tiers.give_up(ref(7))
    get(setup, 5, 6)
    setup.tiers.close()


@pytest.mark.parametrize("deleted", [0, 1])
def test_one_that_is_deleted_ends_the_gathering_it_is_in(deleted: int) -> None:
    """Whether it is there or waits: nothing stays in use, and another group has its turn."""
    setup = Setup(slots=2)
    setup.get(0)
    setup.get(4)
    setup.tiers.prefetch(ref(1))
    setup.settle()
    assert ask(setup, 0, 1) is None
    assert setup.tiers.gathered == ("id-0", "id-1")
    setup.tiers.release(ref(0))
    assert setup.tiers.forget(ref(deleted), PATIENCE_S)
    assert not any(row["users"] for row in setup.tiers.residents() if row["id"] != "id-4")
    setup.tiers.stop_gathering()
    for number in (0, 1):
        setup.tiers.give_up(ref(number))
    setup.tiers.release(ref(4))
    check_nothing_is_kept(setup)
    get(setup, 5, 8)
    setup.tiers.close()


def test_one_whose_files_cannot_be_read_ends_it() -> None:
    setup = Setup(slots=2)
    setup.get(0)
    setup.get(4)
    setup.tiers.prefetch(ref(1))
    setup.settle()
    assert ask(setup, 0, 1) is None
    setup.tiers.release(ref(0))
    assert setup.tiers.forget(ref(1))
    setup.disk.broken[1] = OSError("gone")
    setup.tiers.release(ref(4))
    with pytest.raises(AdapterLoadFailed, match="could not be loaded"):
        get(setup, 0, 1)
    check_nothing_is_kept(setup)
    setup.tiers.close()


def test_a_group_whose_files_come_slowly_holds_up_no_other() -> None:
    setup = Setup(slots=2, threads=NUM_LOADERS)
    setup.disk.slow[0] = threading.Event()
    setup.use(1)
    for numbers in ((4, 5), (5, 8), (9, 4)):
        assert ask(setup, 1, 0) is None
        get(setup, *numbers, is_hurried=True)  # one of the other group's is there and kept for it
        let_go(setup, *numbers)
    setup.disk.slow[0].set()
    get(setup, 1, 0)
    setup.tiers.close()


def test_pinning_one_in_use_tells_who_waits_that_there_is_no_room() -> None:
    setup = Setup(slots=2, device_bytes=4 * SMALL)
    setup.get(0)
    setup.get(4)
    assert setup.tiers.acquire(ref(2)) is None  # larger than what one leaves
    setup.settle()
    setup.tiers.release(ref(4))
    setup.tiers.forget(ref(4))
    setup.settle()
    assert setup.tiers.acquire(ref(2)) is None
    setup.tiers.set_pinned(ref(0), True)
    with pytest.raises(AdapterLoadFailed, match="pinned adapters leave no room"):
        setup.get(2)
    setup.tiers.close()
