"""What adapters do to outputs, and to inputs, by vectors of their own: in place, row by row."""

import pytest
import torch

from manylora.kernels import native
from manylora.kernels.reference import OutputChange, change_output
from manylora.lora.memory.device_memory import OutputEntry
from tests.kernels.tolerance import assert_close, assert_same_bits

SLOTS = 4


def make_changes(widths: tuple[int, ...], seed: int) -> list[list[OutputChange | None]]:
    """For each member and slot: both vectors, one, the other, none."""
    g = torch.Generator().manual_seed(seed)

    def drawn(kind: int, width: int) -> OutputChange | None:
        scale, shift = torch.randn(width, generator=g), torch.randn(width, generator=g)
        return [OutputChange(scale, shift), OutputChange(scale), OutputChange(shift=shift), None][kind]

    return [[drawn((slot + m) % SLOTS, width) for slot in range(SLOTS)] for m, width in enumerate(widths)]


def entry_of(change: OutputChange | None) -> OutputEntry:
    if change is None:
        return OutputEntry()
    vectors = (change.scale, change.shift)
    scale, shift = (0 if each is None else each.data_ptr() for each in vectors)
    return OutputEntry(scale, shift, next(len(each) for each in vectors if each is not None))


def arguments(
    changes: list[list[OutputChange | None]], offsets: list[int], slots: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    order = torch.argsort(slots, stable=True)
    order = order[slots[order] >= 0]
    used, counts = torch.unique_consecutive(slots[order], return_counts=True)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    tables = torch.tensor([[entry_of(each) for each in member] for member in changes])
    return tables, torch.tensor(offsets, dtype=torch.int32), order.int(), used.int(), starts.int()


@pytest.mark.parametrize("widths", [(1,), (64,), (97, 33, 5), (576, 1536)])
@pytest.mark.parametrize("rows", [1, 9, 140])
def test_each_row_is_changed_as_its_own_adapter_says(
    cpu_path: str, dtype: torch.dtype, widths: tuple[int, ...], rows: int
) -> None:
    g = torch.Generator().manual_seed(rows)
    changes = make_changes(widths, rows)
    offsets = [sum(widths[:m]) for m in range(len(widths) + 1)]
    slots = torch.randint(-1, SLOTS, (rows,), generator=g)
    out = torch.randn(rows, offsets[-1], generator=g).to(dtype)
    found = out.clone()
    native.change_output_(found, *arguments(changes, offsets, slots))
    for m, member in enumerate(changes):
        columns = slice(offsets[m], offsets[m + 1])
        assert_close(found[:, columns], change_output(out[:, columns], member, slots.tolist()))
    assert_same_bits(found[slots < 0], out[slots < 0])


def test_a_vector_that_is_not_finite_moves_no_other_row(cpu_path: str, dtype: torch.dtype) -> None:
    spoiled = OutputChange(torch.full((33,), float("nan")), torch.full((33,), float("inf")))
    sound = OutputChange(torch.rand(33), torch.rand(33))
    slots = torch.tensor([0, 1, -1, 0, 1])
    out = torch.randn(5, 33).to(dtype)
    beside, alone = out.clone(), out.clone()
    native.change_output_(beside, *arguments([[spoiled, sound]], [0, 33], slots))
    native.change_output_(alone, *arguments([[None, sound]], [0, 33], slots))
    assert_same_bits(beside[[1, 2, 4]], alone[[1, 2, 4]])
    assert not beside[[0, 3]].isfinite().any()


def test_vectors_of_another_size_are_refused(cpu_path: str) -> None:
    changes: list[list[OutputChange | None]] = [[OutputChange(torch.ones(8))]]
    with pytest.raises(ValueError, match="slot 0 changes outputs of 8, and this has 9"):
        native.change_output_(torch.ones(2, 9), *arguments(changes, [0, 9], torch.zeros(2, dtype=torch.int64)))
