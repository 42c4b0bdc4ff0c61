"""Rows that have several adapters, each with a weight: in place, in one sum."""

from collections.abc import Sequence

import pytest
import torch

from manylora.kernels import native
from manylora.kernels.reference import MixPart, OutputChange, add_mixes
from manylora.lora.memory.device_memory import OutputEntry
from tests.kernels.lora_case import DENSE, LoraCase, make_case
from tests.kernels.test_change_output import entry_of, make_changes
from tests.kernels.tolerance import assert_close, assert_same_bits

RANKS = [8, DENSE, 3, 16]
MIXES: Sequence[Sequence[tuple[int, float]]] = (
    ((0, 0.7), (2, 0.3)),
    ((3, 1.0), (1, -0.5), (0, 0.25)),
    ((2, 0.5),),
    ((0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0)),
)
Changes = list[list[OutputChange | None]]
Inputs = list[torch.Tensor | None]


def grouped(numbers: torch.Tensor, mixes: Sequence[Sequence[tuple[int, float]]]) -> tuple[torch.Tensor, ...]:
    """`order`, `row_starts` and what follows, of rows with these numbers of mixes."""
    order = torch.argsort(numbers, stable=True)
    order = order[numbers[order] >= 0]
    used, counts = torch.unique_consecutive(numbers[order], return_counts=True)
    found = [mixes[number] for number in used.tolist()]
    parts = [part for mix in found for part in mix]
    starts = torch.tensor([0, *(len(mix) for mix in found)], dtype=torch.int32).cumsum(0)
    return (
        order.int(),
        torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int(),
        starts.int(),
        torch.tensor([slot for slot, _ in parts], dtype=torch.int32),
        torch.tensor([weight for _, weight in parts], dtype=torch.float32),
    )


def run(
    case: LoraCase,
    changes: Changes,
    inputs: Inputs,
    numbers: torch.Tensor,
    mixes: Sequence[Sequence[tuple[int, float]]] = MIXES,
    rows: slice = slice(None),
) -> torch.Tensor:
    out = case.out[rows].clone()
    of_inputs = [OutputEntry() if v is None else OutputEntry(v.data_ptr(), 0, len(v)) for v in inputs]
    native.add_mixes_(
        out, case.x[rows], case.tables, torch.tensor([of_inputs for _ in changes]),
        torch.tensor([[entry_of(each) for each in member] for member in changes]),
        torch.tensor(case.offsets, dtype=torch.int32), *grouped(numbers[rows], mixes),
    )  # fmt: skip
    return out


def expected(case: LoraCase, changes: Changes, inputs: Inputs, numbers: torch.Tensor) -> torch.Tensor:
    result = case.out.double()
    for m, member in enumerate(case.weights):
        columns = slice(case.offsets[m], case.offsets[m + 1])
        parts = [
            [
                MixPart(weight, found.reference() if (found := member[slot]) else None, changes[m][slot], inputs[slot])
                for slot, weight in mix
            ]
            for mix in MIXES
        ]
        result[:, columns] = add_mixes(case.out[:, columns], case.x, parts, numbers.tolist())
    return result


@pytest.mark.parametrize(
    ("in_features", "widths", "rows"), [(1, (1,), 3), (97, (203, 17), 9), (576, (192, 1536), 5), (64, (33,), 140)]
)
@pytest.mark.parametrize("weight_dtypes", [(), (torch.float32, torch.int8, torch.bfloat16, torch.float16)])
def test_each_row_gets_the_weighted_sum_of_its_own_adapters(
    cpu_path: str,
    dtype: torch.dtype,
    in_features: int,
    widths: tuple[int, ...],
    rows: int,
    weight_dtypes: Sequence[torch.dtype],
) -> None:
    case = make_case(dtype, RANKS, in_features=in_features, widths=widths, rows=rows, weight_dtypes=weight_dtypes)
    changes = make_changes(widths, rows)
    g = torch.Generator().manual_seed(rows)
    inputs: Inputs = [None] * len(RANKS)
    if len(widths) == 1:
        inputs[2] = torch.rand(in_features, generator=g)
    numbers = torch.randint(-1, len(MIXES), (rows,), generator=g)
    numbers[: len(MIXES) - 1] = torch.arange(len(MIXES))[:rows][: len(MIXES) - 1]
    together = run(case, changes, inputs, numbers)
    assert_close(together, expected(case, changes, inputs, numbers))
    assert_same_bits(together[numbers < 0], case.out[numbers < 0])
    for t in range(0, rows, 13):
        assert_same_bits(run(case, changes, inputs, numbers, rows=slice(t, t + 1)), together[t : t + 1])


def test_few_rows_of_large_adapters_are_split_over_threads(cpu_path: str, dtype: torch.dtype) -> None:
    case = make_case(dtype, [120, DENSE, 250, 64], in_features=1024, widths=(2051,), rows=4)
    changes = make_changes((2051,), 1)
    numbers = torch.tensor([0, 1, -1, 1])
    assert_close(run(case, changes, [None] * 4, numbers), expected(case, changes, [None] * 4, numbers))


def test_numbers_that_are_not_finite_move_no_row_without_them(cpu_path: str, dtype: torch.dtype) -> None:
    case = make_case(dtype, RANKS, widths=(64,), rows=40)
    changes: Changes = [[None] * len(RANKS)]
    numbers = torch.arange(40) % 5 - 1
    clean = run(case, changes, [None] * 4, numbers)
    spoiled = case.weights[0][3]
    assert spoiled is not None
    spoiled.a.fill_(float("nan"))
    beside = run(case, changes, [None] * 4, numbers)
    has_it = torch.tensor([n >= 0 and any(slot == 3 for slot, _ in MIXES[n]) for n in numbers.tolist()])
    assert_same_bits(beside[~has_it], clean[~has_it])
    assert beside[has_it].isnan().all()


def test_a_norm_or_an_input_is_changed_without_anything_added(cpu_path: str, dtype: torch.dtype) -> None:
    changes = make_changes((33,), 2)
    numbers = torch.tensor([0, -1, 1, 3, 0])
    out = torch.randn(5, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = out.clone()
    tables = torch.tensor([[entry_of(each) for each in changes[0]]])
    native.add_mixes_(found, None, None, None, tables, torch.tensor([0, 33], dtype=torch.int32),
                      *grouped(numbers, MIXES))  # fmt: skip
    parts = [[MixPart(weight, None, changes[0][slot]) for slot, weight in mix] for mix in MIXES]
    assert_close(found, add_mixes(out, out, parts, numbers.tolist()))


def test_arguments_that_do_not_fit_are_refused(cpu_path: str) -> None:
    case = make_case(torch.float32, RANKS, widths=(64,), rows=4)
    changes: Changes = [[None] * len(RANKS)]
    numbers = torch.tensor([0, 0, 1, -1])
    run(case, changes, [None] * 4, numbers)
    with pytest.raises(IndexError, match="part_slots must be in"):
        run(case, changes, [None] * 4, numbers, (((4, 1.0),), ((0, 1.0),)))
    with pytest.raises(ValueError, match="slot 0 changes outputs of 8, and this has 64"):
        run(case, [[OutputChange(torch.ones(8)), None, None, None]], [None] * 4, numbers)
    with pytest.raises(ValueError, match="slot 2 changes outputs of 5, and this has 96"):
        run(case, changes, [None, None, torch.ones(5), None], numbers)
    with pytest.raises(ValueError, match=r"slot 0 is for .96. -> .64., and this is .7. -> .64."):
        native.add_mixes_(
            case.out, torch.ones(4, 7), case.tables, torch.zeros(1, 4, 3, dtype=torch.int64),
            torch.zeros(1, 4, 3, dtype=torch.int64), torch.tensor(case.offsets, dtype=torch.int32),
            *grouped(numbers, MIXES),
        )  # fmt: skip
