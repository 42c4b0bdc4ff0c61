"""Adapters come and go between the tiers, and nobody loses the one they use."""

import os
import sys
import threading

import pytest

from manylora.engine.build import NUM_LOADERS
from manylora.engine.interface import Residency
from tests.lora.packed import random_packed
from tests.lora.tier_setup import SHAPES, SMALL, Disk, Setup, numbered, ref, weights


def test_first_answer_is_not_yet_and_the_load_runs_on_its_own_thread(setup: Setup) -> None:
    setup.disk.gate.clear()
    assert setup.tiers.acquire(ref(0)) is None
    assert setup.tiers.tier_of(ref(0)) == "disk"
    setup.disk.gate.set()
    slot = setup.get(0)
    assert setup.holds(0, slot)
    assert setup.tiers.tier_of(ref(0)) == "device"
    assert setup.events.loads == ["disk", "host"]


@pytest.mark.skipif(sys.platform != "linux", reason="binds a thread to a CPU")
def test_loads_are_not_bound_to_the_cpu_of_the_thread_that_asks() -> None:
    setup = Setup(threads=NUM_LOADERS)
    everywhere = os.sched_getaffinity(0)

    def ask() -> None:
        os.sched_setaffinity(0, {min(everywhere)})
        setup.get(0)

    asking = threading.Thread(target=ask)
    asking.start()
    asking.join()
    loaders = [each for each in threading.enumerate() if each.name.startswith("adapter-loader")]
    assert len(loaders) >= NUM_LOADERS > 1
    assert all(each.native_id and os.sched_getaffinity(each.native_id) == everywhere for each in loaders)
    setup.tiers.close()


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


def test_what_is_offered_is_taken_without_reading_until_it_is_taken_back(setup: Setup) -> None:
    setup.tiers.offer(ref(0), numbered(2))
    assert setup.holds(2, setup.get(0))
    assert not setup.disk.reads
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


def test_residency_says_who_is_where_and_what_for() -> None:
    setup = Setup(slots=2, threads=2)
    for number in (0, 1):
        setup.get(number)
    setup.tiers.release(ref(0))
    setup.tiers.set_pinned(ref(1), True)
    setup.disk.slow[2] = threading.Event()
    setup.tiers.prefetch(ref(2))
    found = Residency(**setup.tiers.residency())
    assert (found.num_slots, found.device, found.running) == (2, (ref(0), ref(1)), (ref(1),))
    assert set(found.host) == {ref(0), ref(1)}
    assert found.waiting == (ref(2),)
    assert found.pinned == {"id-1"}
    setup.disk.slow[2].set()
    setup.tiers.close()


def test_one_whose_files_come_slowly_holds_up_nobody_else() -> None:
    setup = Setup(threads=NUM_LOADERS)
    setup.disk.slow[0] = threading.Event()
    setup.tiers.prefetch(ref(0))
    for number in (1, 2, 3):
        assert setup.holds(number, setup.get(number))
    assert setup.tiers.acquire(ref(0)) is None
    setup.disk.slow[0].set()
    setup.tiers.release(ref(1))
    assert setup.holds(0, setup.get(0))
    setup.tiers.close()
