import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from manylora.kernels.rows import group_rows

CPU = torch.device("cpu")
NUM_SLOTS = 6


def ranks(touched: list[list[int]]) -> np.ndarray:
    """One row per site: the slots that have weights there."""
    table = np.zeros((len(touched), NUM_SLOTS), dtype=np.int32)
    for site, slots in enumerate(touched):
        table[site, slots] = 8
    return table


def test_rows_are_sorted_by_slot_and_keep_their_order() -> None:
    found = group_rows(np.array([4, -1, 2, 4, 2, -1, 0], dtype=np.int32), ranks([[0, 2, 4]]), CPU)
    assert found is not None
    assert found.order.tolist() == [6, 2, 4, 0, 3]
    assert found.segment_slots.tolist() == list(found.slots) == [0, 2, 4]
    assert found.segment_starts.tolist() == list(found.starts) == [0, 1, 3, 5]
    assert {found.order.dtype, found.segment_slots.dtype, found.segment_starts.dtype} == {torch.int32}


def test_a_batch_of_the_bare_base_has_no_groups() -> None:
    assert group_rows(np.array([-1, -1], dtype=np.int32), ranks([[0]]), CPU) is None
    assert group_rows(np.array([], dtype=np.int32), ranks([[0]]), CPU) is None


def test_sites_that_no_adapter_of_the_step_touches_are_marked() -> None:
    found = group_rows(np.array([1, 3], dtype=np.int32), ranks([[1], [], [0, 2], [1, 3]]), CPU)
    assert found is not None
    assert found.touched == [True, False, False, True]


@given(st.lists(st.integers(-1, NUM_SLOTS - 1), min_size=1, max_size=50))
def test_every_row_with_an_adapter_is_in_its_slots_segment_once(row_slots: list[int]) -> None:
    found = group_rows(np.array(row_slots, dtype=np.int32), ranks([[]]), CPU)
    wanted = {t: s for t, s in enumerate(row_slots) if s >= 0}
    seen: dict[int, int] = {}
    if found is not None:
        order = found.order.tolist()
        for i, slot in enumerate(found.slots):
            rows = order[found.starts[i] : found.starts[i + 1]]
            assert rows == sorted(rows)
            seen |= dict.fromkeys(rows, slot)
        assert len(order) == len(seen)
        assert list(found.slots) == sorted(set(found.slots))
    assert seen == wanted
