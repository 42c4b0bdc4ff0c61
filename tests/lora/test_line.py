"""The loaders' line: tenants in turn, and never all threads to one."""

import threading
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.identity import AdapterRef
from manylora.lora.format.spec import Adapter
from manylora.lora.memory.line import LoadLine
from tests.lora.tier_setup import PATIENCE_S, Disk, Setup, ref


def started(line: LoadLine[str]) -> list[tuple[str, str]]:
    found = []
    while (one := line.next()) is not None:
        found.append(one)
    return found


def test_a_thousand_of_one_tenant_do_not_come_before_the_first_of_another() -> None:
    line: LoadLine[str] = LoadLine(4)
    for number in range(1000):
        line.add(f"greedy-{number}", ("greedy",))
    assert started(line) == [("greedy-0", "greedy"), ("greedy-1", "greedy")]
    line.add("quiet-0", ("quiet",))
    assert started(line) == [("quiet-0", "quiet")]


def test_tenants_take_turns_and_each_is_served_in_order() -> None:
    line: LoadLine[str] = LoadLine(1)
    for number in range(3):
        for tenant in "abc":
            line.add(f"{tenant}{number}", (tenant,))
    order = []
    while (found := line.next()) is not None:
        order.append(found[0])
        line.done(found[1])
    assert order == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "b2", "c2"]


def test_what_two_wait_for_comes_with_the_first_turn_of_either_and_once() -> None:
    line: LoadLine[str] = LoadLine(1)
    for number in range(5):
        line.add(f"greedy-{number}", ("greedy",))
    line.add("greedy-4", ("quiet",))
    order = []
    while (found := line.next()) is not None:
        order.append(found)
        line.done(found[1])
    assert order[:2] == [("greedy-0", "greedy"), ("greedy-4", "quiet")]
    assert Counter(key for key, _ in order) == Counter(f"greedy-{number}" for number in range(5))


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 8))
def test_in_any_order_nobody_has_more_than_half_of_what_is_left_and_all_are_served(
    data: st.DataObject, num_threads: int
) -> None:
    line: LoadLine[int] = LoadLine(num_threads)
    running: list[tuple[int, str]] = []
    added: set[int] = set()
    done: set[int] = set()

    def start() -> None:
        while (found := line.next()) is not None:
            running.append(found)
            mine = sum(tenant == found[1] for _, tenant in running)
            assert len(running) <= num_threads
            assert mine <= max(1, (num_threads - len(running) + mine) // 2)

    for number in range(data.draw(st.integers(0, 40))):
        action = data.draw(st.sampled_from(["add", "add", "end", "discard"]))
        if action == "add":
            added.add(number)
            line.add(number, data.draw(st.sets(st.sampled_from("abcd"), min_size=1)))
        elif action == "end" and running:
            key, tenant = running.pop(data.draw(st.integers(0, len(running) - 1)))
            done.add(key)
            line.done(tenant)
        elif added and line.discard(key := data.draw(st.sampled_from(sorted(added)))):
            added.remove(key)
        start()
        line.check_integrity()
    while running:
        key, tenant = running.pop()
        done.add(key)
        line.done(tenant)
        start()
        line.check_integrity()
    assert done == added


def test_a_tenant_whose_files_come_slowly_holds_up_its_own_loads_only() -> None:
    """Its reads stand still until the end, and the other tenant's adapters come all the same."""
    disk = Disk()
    setup = Setup(slots=16, threads=4, disk=disk)
    is_open = threading.Event()

    def slowly(wanted: AdapterRef) -> Adapter:
        assert int(wanted.id.removeprefix("id-")) >= 100 or is_open.wait(PATIENCE_S)
        return disk.read(wanted)

    setup.tiers._read = slowly
    try:
        for number in range(20):
            setup.tiers.prefetch(ref(number), "slow")
        for number in range(100, 103):
            assert setup.get(number) >= 0
            setup.tiers.release(ref(number))
    finally:
        is_open.set()
    setup.settle()
    setup.tiers.close()


def test_loads_that_nobody_waits_for_any_more_are_not_begun() -> None:
    disk = Disk()
    setup = Setup(slots=16, threads=2, disk=disk)
    disk.gate.clear()
    for number in range(10):
        setup.tiers.prefetch(ref(number), "flood")
    for number in range(1, 10):
        setup.tiers.give_up(ref(number))
    disk.gate.set()
    setup.settle()
    assert disk.reads == [0]
    assert setup.tiers.forget(ref(5), timeout_s=0)
    setup.tiers.close()
