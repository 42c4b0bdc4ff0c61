"""The queue is shared before it is joined: no tenant can take the others' places in it."""

from collections import Counter
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.engine.admission import Admission
from manylora.errors import QueueFull

SEATS, MAX_OPEN = 64, 64 + 2048


def fill(admission: Admission, tenant: str, size: int = 1) -> int:
    """Ask until there is no room; how many got in."""
    count = 0
    while True:
        try:
            admission.check(tenant, size)
        except QueueFull:
            return count
        for _ in range(size):
            admission.enter(tenant)
        count += size


def test_one_tenant_that_queues_thousands_leaves_the_others_their_room() -> None:
    admission = Admission(MAX_OPEN, SEATS, 0.5)
    assert fill(admission, "greedy") == MAX_OPEN // 2 == admission.most
    assert fill(admission, "second") == MAX_OPEN // 4
    assert fill(admission, "third") == MAX_OPEN // 8


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_greedy_tenants_come_to_equal_parts(share: float) -> None:
    admission = Admission(MAX_OPEN, SEATS, share)
    tenants, held = "abcd", Counter[str]()
    for _ in range(20):
        for tenant in tenants:
            for _ in range(held[tenant] // 2):
                admission.leave(tenant)
            held[tenant] -= held[tenant] // 2
            held[tenant] += fill(admission, tenant)
    assert max(held.values()) <= 1.3 * min(held.values())
    assert MAX_OPEN - held.total() >= ceil((1 - share) * min(held.values()))


def test_a_lone_tenant_may_fill_the_batch_and_a_whole_share_is_the_whole_queue() -> None:
    assert fill(Admission(65, 64, 0.5), "only") == 64
    assert fill(Admission(MAX_OPEN, SEATS, 1.0), "only") == MAX_OPEN
    assert fill(Admission(3, 64, 0.5), "only") == 3


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_four_others_do_a_newcomer_finds_a_place(data: st.DataObject) -> None:
    """In any order of joining and leaving, in steps of any size; and nobody is ever over its share when it joins."""
    seats = data.draw(st.integers(1, 64))
    max_open = seats + data.draw(st.integers(seats + 63, 512))
    admission, held = Admission(max_open, seats, 0.5), Counter[str]()
    for _ in range(data.draw(st.integers(1, 60))):
        tenant = data.draw(st.sampled_from("abcd"))
        size = data.draw(st.sampled_from([1, 1, 3, 40, max_open]))
        if data.draw(st.booleans()):
            others = held.total() - held[tenant]
            try:
                admission.check(tenant, size)
            except QueueFull:
                assert held[tenant] + size > (max_open - others) // 2 or held.total() + size > max_open
                continue
            for _ in range(size):
                admission.enter(tenant)
            held[tenant] += size
            assert held[tenant] <= max((max_open - others + 1) // 2, 0 if others else seats)
        else:
            for _ in range(gone := min(size, held[tenant])):
                admission.leave(tenant)
            held[tenant] -= gone
        admission.check_integrity(+held)
        admission.check("newcomer", 1)
