"""What goes wrong on an adapter's way in reaches who asked for it, and harms nobody else."""

import pytest

from manylora.errors import AdapterLoadFailed, AdapterNotFound, DatabaseUnavailable, InvalidAdapter, Problem
from tests.lora.tier_setup import SMALL, Setup, ref


@pytest.mark.parametrize(
    "error",
    [
        OSError("disk on fire"),
        ValueError("bad"),
        KeyError("k"),
        RuntimeError("r"),
        MemoryError("full"),
        TypeError("nobody thought of it"),
        AssertionError("nor of this"),
    ],
)
def test_a_failed_load_reaches_who_asked_once_and_can_be_tried_again(setup: Setup, error: Exception) -> None:
    setup.disk.broken[0] = error
    with pytest.raises(AdapterLoadFailed, match="adapter-0@1 could not be loaded"):
        setup.get(0)
    assert setup.tiers.tier_of(ref(0)) == "disk"
    del setup.disk.broken[0]
    assert setup.holds(0, setup.get(0))


def test_our_own_errors_arrive_as_they_are(setup: Setup) -> None:
    setup.disk.broken[0] = DatabaseUnavailable("The database does not answer.")
    with pytest.raises(DatabaseUnavailable):
        setup.get(0)


def test_stored_files_that_are_no_adapter_are_our_fault_and_no_callers(setup: Setup) -> None:
    setup.disk.broken[0] = InvalidAdapter([Problem("not_finite", "x", "It holds NaN.")])
    with pytest.raises(AdapterLoadFailed, match="It holds NaN"):
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


def test_an_adapter_that_was_deleted_meanwhile_is_not_found_and_no_failure(setup: Setup) -> None:
    setup.disk.broken[0] = AdapterNotFound("There is no adapter.")
    with pytest.raises(AdapterNotFound):
        setup.get(0)
    assert setup.events.failures == []
    setup.disk.broken[1] = OSError("gone")
    with pytest.raises(AdapterLoadFailed):
        setup.get(1)
    assert setup.events.failures == [ref(1)]
