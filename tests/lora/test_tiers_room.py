"""Room on the device is counted in bytes, whatever the layouts and whoever came first."""

from contextlib import suppress

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.errors import AdapterLoadFailed, Conflict
from manylora.kernels.cpu import cpu_multiplies
from manylora.kernels.rows import group_rows
from manylora.kernels.torch_lora import TorchKernel
from tests.lora.packed import random_packed
from tests.lora.tier_setup import RANKS, SHAPES, SMALL, Setup, ref

PLACES = TorchKernel.places_per_slab
SIZES = [random_packed(ranks, SHAPES)[0].size_bytes for ranks in RANKS]


def size_of(number: int) -> int:
    return SIZES[number % len(SIZES)]


def test_a_pinned_adapter_leaves_the_rest_of_the_budget_to_other_layouts() -> None:
    setup = Setup(slots=256, device_bytes=12 * SMALL, places_per_slab=PLACES)
    setup.tiers.set_pinned(ref(0), True)
    setup.use(0)
    for number in (2, 3):
        assert setup.holds(number, setup.get(number))
    assert setup.holds(0, setup.get(0))
    assert setup.events.evictions == []
    setup.tiers.check_integrity()
    setup.tiers.close()


def test_a_pinned_adapter_in_the_middle_of_its_slab_holds_back_no_place_of_it() -> None:
    setup = Setup(slots=256, device_bytes=6 * SMALL, places_per_slab=PLACES)
    for number in (0, 1, 4, 5):  # all of one layout
        setup.use(number)
    setup.tiers.set_pinned(ref(4), True)
    assert setup.holds(2, setup.get(2))
    assert setup.holds(4, setup.get(4))
    assert setup.book.used_bytes <= setup.book.budget_bytes
    setup.tiers.check_integrity()
    setup.tiers.close()


def test_an_idle_adapter_is_not_evicted_while_bytes_are_free() -> None:
    setup = Setup(slots=256, device_bytes=12 * SMALL, places_per_slab=PLACES)
    for number in (0, 3, 2):
        setup.use(number)
    assert {setup.tiers.tier_of(ref(number)) for number in (0, 3, 2)} == {"device"}
    setup.tiers.close()


def test_a_step_that_was_planned_before_an_adapter_moved_multiplies_the_same_numbers() -> None:
    setup = Setup(slots=8, device_bytes=6 * SMALL, places_per_slab=PLACES)
    setup.use(1)
    slot = setup.get(0)
    rows = group_rows(torch.tensor([slot] * 3, dtype=torch.int32).numpy(), setup.memory.touches, torch.device("cpu"))
    assert rows is not None
    kernel = TorchKernel(cpu_multiplies, sums_in_bags=True)
    planned = kernel.plan(rows, setup.memory)
    before = setup.memory.locate(slot)
    assert setup.holds(2, setup.get(2))
    assert setup.memory.locate(slot)[0] is not before[0]
    setup.get(3)  # what the old slab took is given to others
    again = kernel.plan(rows, setup.memory)
    assert [part.slab for part in planned._slabs] == [before[0]]
    assert [part.slab for part in again._slabs] == [setup.memory.locate(slot)[0]]
    after = setup.memory.locate(slot)
    extent = before[0].layout.low_rank[0]
    assert torch.equal(before[0].stack_a(extent)[before[1]], after[0].stack_a(extent)[after[1]])
    assert setup.holds(0, slot)
    setup.tiers.close()


@settings(max_examples=60, deadline=None)
@given(
    budget=st.integers(2, 14),
    places=st.sampled_from([1, 2, 3, PLACES]),
    steps=st.lists(st.tuples(st.integers(0, 11), st.sampled_from(["use", "hold", "pin"])), max_size=14),
    last=st.integers(0, 11),
)
def test_an_adapter_fits_exactly_when_its_bytes_do(
    budget: int, places: int, steps: list[tuple[int, str]], last: int
) -> None:
    setup = Setup(slots=32, device_bytes=budget * SMALL, host_bytes=2**20, places_per_slab=places)
    kept: set[int] = set()  # pinned or in use: they cannot leave
    for number, how in steps:
        taken = sum(map(size_of, kept - {number}))
        if taken + size_of(number) > setup.book.budget_bytes:
            continue
        if how == "pin":
            try:
                setup.tiers.set_pinned(ref(number), True)
            except Conflict:
                continue
        slot = setup.get(number)
        assert setup.holds(number, slot)
        if how == "hold":
            kept.add(number)
        else:
            setup.tiers.release(ref(number))
            kept |= {number} if how == "pin" else set()
    fits = sum(map(size_of, kept - {last})) + size_of(last) <= setup.book.budget_bytes
    found: int | None = None
    with suppress(AdapterLoadFailed):
        setup.tiers.acquire(ref(last))
        setup.settle()
        found = setup.tiers.acquire(ref(last))
    assert (found is not None) == fits
    assert found is None or setup.holds(last, found)
    for number in kept:
        assert setup.tiers.tier_of(ref(number)) == "device"
        assert setup.holds(number, setup.get(number))
    setup.tiers.check_integrity()
    setup.tiers.close()
