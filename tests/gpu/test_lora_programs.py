"""The low-rank programs in the interpreter, against the specification in kernels/reference.py."""

import functools

import numpy as np
import pytest
import torch

from manylora.kernels.interface import SiteGroup
from manylora.kernels.reference import add_lora, change_output
from manylora.kernels.rows import group_rows
from manylora.kernels.triton_lora import TritonKernel, TritonPlan
from manylora.lora.memory.device_memory import DeviceMemory
from tests.kernels.lora_case import DENSE, POPULARITIES, LoraCase, make_case
from tests.kernels.test_change_output import arguments, make_changes
from tests.kernels.tolerance import TOLERANCES, assert_close, assert_same_bits
from tests.lora.test_torch_kernel import Fleet

pytestmark = pytest.mark.interpreted
CPU = torch.device("cpu")
KERNEL = TritonKernel()
by_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def plan_of(slots: torch.Tensor, memory: DeviceMemory, num_single: int | None) -> TritonPlan | None:
    found = group_rows(
        slots.numpy().astype(np.int32), memory.touches, CPU, inputs=memory.inputs.flags, outputs=memory.outputs.flags,
        num_single=num_single,
    )  # fmt: skip
    return None if found is None else KERNEL.plan(found, memory)


def run(case: LoraCase, num_single: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
    out = case.out.clone() if out is None else out
    group = SiteGroup(0, tuple(case.offsets), torch.tensor(case.offsets, dtype=torch.int32))
    plan = plan_of(case.row_slots, case.memory(CPU), num_single)
    if plan is not None:
        plan.add_(out, case.x, group)
    return out


@by_dtype
@pytest.mark.parametrize(
    ("rank", "in_features", "width"), [(1, 1, 1), (3, 7, 5), (8, 64, 96), (16, 97, 203), (64, 200, 48), (40, 300, 17)]
)
def test_delta_is_right_for_every_rank_and_width(dtype: torch.dtype, rank: int, in_features: int, width: int) -> None:
    case = make_case(dtype, [rank] * 3, in_features=in_features, widths=(width,), rows=7)
    assert_close(run(case), case.expected())
    assert_close(run(case, num_single=0), case.expected())


@by_dtype
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_weights_may_be_of_another_type_than_the_rows(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    case = make_case(dtype, [16, 3, 64], in_features=97, widths=(203, 17), rows=20, weight_dtypes=[weight_dtype])
    assert_close(run(case), case.expected())


@pytest.mark.parametrize("num_single", [None, 0, 11])
def test_one_batch_may_hold_adapters_of_every_type(num_single: int | None) -> None:
    kinds = [torch.float32, torch.int8, torch.bfloat16, torch.float16]
    case = make_case(torch.bfloat16, [8] * 8, in_features=96, widths=(96, 40), rows=40, weight_dtypes=kinds)
    assert_close(run(case, num_single), case.expected())


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize(("rows", "num_single"), [(1, None), (5, 2), (33, None), (130, 20), (130, 0)])
def test_delta_is_right_for_every_mix_of_rows(popularity: str, rows: int, num_single: int | None) -> None:
    case = make_case(torch.float32, [1, 40, 3, 16, 8], rows=rows, popularity=popularity)
    actual = run(case, num_single)
    assert_close(actual, case.expected())
    kept = case.row_slots < 0
    assert_same_bits(actual[kept], case.out[kept])


def test_members_without_an_adapter_stay_as_they_are() -> None:
    case = make_case(torch.float32, [0, 8], widths=(32, 32), rows=6, popularity="distinct")
    actual = run(case)
    untouched = case.row_slots == 0
    assert_same_bits(actual[untouched], case.out[untouched])
    assert_same_bits(actual[:, :32], case.out[:, :32])
    assert_close(actual, case.expected())


@by_dtype
@pytest.mark.parametrize("value", ["nan", "inf", "largest"])
def test_a_spoiled_adapter_moves_no_bit_of_its_neighbours(dtype: torch.dtype, value: str) -> None:
    case = make_case(dtype, [8, 16, 3], rows=20, popularity="distinct")
    clean = run(case, num_single=9)
    spoiled = case.weights[0][1]
    assert spoiled is not None
    assert spoiled.b is not None
    for matrix in (spoiled.a, spoiled.b):
        matrix.fill_(torch.finfo(dtype).max if value == "largest" else float(value))
    others = case.row_slots != 1
    actual = run(case, num_single=9)
    assert_same_bits(actual[others], clean[others])
    assert not torch.isfinite(actual[~others]).any()


@functools.cache
def numpy_has_rows_alike() -> bool:
    """Whether numpy's product in float32, with which the interpreter computes, gives a row the same bits at any place
    of a tile. On CPUs without AVX-512 it does not; a device does.
    """
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape, dtype=np.float32) for shape in ((64, 128), (128, 64)))
    whole = {rows: x[:rows] @ w for rows in (16, 64)}
    return all(
        np.array_equal((np.roll(x[:rows], by, axis=0) @ w)[by], whole[rows][0]) for rows in whole for by in range(rows)
    )


@by_dtype
@pytest.mark.parametrize(("width", "num_single"), [(203, None), (64, 0)])
def test_a_rows_result_does_not_depend_on_the_rows_beside_it(
    dtype: torch.dtype, width: int, num_single: int | None
) -> None:
    case = make_case(dtype, [16, 5], in_features=300, widths=(width,), rows=75, popularity="uniform")
    together = run(case, num_single)
    check = assert_close if dtype == torch.float32 and not numpy_has_rows_alike() else assert_same_bits
    for t in range(0, 75, 15):
        check(run(case.only(slice(t, t + 1)), num_single), together[t : t + 1])


def test_a_row_of_a_sequence_of_one_is_the_same_beside_prompts_of_its_adapter() -> None:
    case = make_case(torch.bfloat16, [16, 5], in_features=300, rows=40, popularity="uniform")
    together = run(case, num_single=10)
    assert_same_bits(run(case.only(slice(0, 10))), together[:10])
    assert_same_bits(run(case.only(slice(10, 40)), num_single=0), together[10:])


def test_rows_may_lie_apart() -> None:
    case = make_case(torch.bfloat16, [8, 16], rows=12)
    wide_x = torch.zeros(12, 3 * case.x.shape[1], dtype=torch.bfloat16)
    wide_out = torch.zeros(12, 2 * case.out.shape[1] + 5, dtype=torch.bfloat16)
    x, out = wide_x[:, 7 : 7 + case.x.shape[1]], wide_out[:, 3 : 3 + case.out.shape[1]]
    x.copy_(case.x)
    out.copy_(case.out)
    case.x = x
    assert_close(run(case, out=out), case.expected())
    assert not wide_out[:, :3].any()
    assert not wide_out[:, 3 + case.out.shape[1] :].any()


@by_dtype
@pytest.mark.parametrize("weight_dtypes", [[], [torch.int8], [torch.bfloat16, torch.float16]])
def test_dense_matrices_are_multiplied_beside_low_rank_ones(
    dtype: torch.dtype, weight_dtypes: list[torch.dtype]
) -> None:
    case = make_case(
        dtype, [DENSE, 8, DENSE, 0], in_features=97, widths=(150, 17), rows=20, weight_dtypes=weight_dtypes
    )
    together = run(case, num_single=8)
    assert_close(together, case.expected())
    assert_same_bits(run(case.only(slice(3, 4))), together[3:4])


@by_dtype
def test_outputs_and_inputs_are_changed_as_each_adapter_says(dtype: torch.dtype) -> None:
    changes, offsets = make_changes((97, 33, 5), 9), (0, 97, 130, 135)
    slots = torch.randint(-1, 4, (30,), generator=torch.Generator().manual_seed(1))
    tables = arguments(changes, list(offsets), slots)[0]
    memory = DeviceMemory(3, 4, CPU)
    memory.touches[:] = True
    for each in (memory.outputs, memory.inputs):
        each.entries, each.flags[:] = tables, tables[..., -1].bool().numpy()
    plan = plan_of(slots, memory, 9)
    assert plan is not None
    out = torch.randn(30, 135).to(dtype)
    found, given = out.clone(), out[:, :97].contiguous()
    plan.change_output_(found, SiteGroup(0, offsets, torch.tensor(offsets, dtype=torch.int32)))
    plan.change_input_(given, SiteGroup(0, (0, 97), torch.tensor((0, 97), dtype=torch.int32)))
    for m, member in enumerate(changes):
        columns = slice(offsets[m], offsets[m + 1])
        assert_close(found[:, columns], change_output(out[:, columns], member, slots.tolist()))
    assert_same_bits(given, found[:, :97])
    assert_same_bits(found[slots < 0], out[slots < 0])


@by_dtype
@pytest.mark.parametrize("weight_dtype", [None, torch.int8], ids=str)
def test_embedding_deltas_are_the_tokens_own_rows(dtype: torch.dtype, weight_dtype: torch.dtype | None) -> None:
    made = Fleet(
        KERNEL, (140, 16), [{0: 8}, {0: 3, 1: 8}, {1: 8}, {0: 20}], in_features=100, dtype=dtype,
        weight_dtype=weight_dtype, embeddings=frozenset({0}),
    )  # fmt: skip
    row_slots = [made.slots[i] for i in (0, 1, 2, 1, 3, 0)] + [-1]
    token_ids = torch.tensor([5, 99, 5, 0, 5, 7, 8])
    actual = torch.zeros(7, 140, dtype=dtype)
    group = SiteGroup(0, (0, 140), torch.tensor((0, 140), dtype=torch.int32))
    made.plan(row_slots).add_embedding_(actual, token_ids, group, 1.5)
    weights = [made.pairs.get(slot, {}).get(0) for slot in range(max(row_slots) + 1)]
    one_hot = torch.nn.functional.one_hot(token_ids, 100).to(dtype)
    assert_close(actual, 1.5 * add_lora(torch.zeros(7, 140, dtype=dtype), one_hot, weights, row_slots))
    assert not actual[[2, 6]].any()


def test_a_dense_embedding_adds_the_tokens_row() -> None:
    case = make_case(torch.bfloat16, [DENSE, 0], in_features=50, widths=(40,), rows=6, weight_dtypes=[torch.int8])
    weights = case.weights[0][0]
    assert weights is not None
    assert weights.scales is not None
    tokens = torch.tensor([3, 39, 0, 7, 7, 1])  # the matrix is [40, 50]: tokens by width
    plan = plan_of(case.row_slots, case.memory(CPU), None)
    assert plan is not None
    out = torch.zeros(6, 50, dtype=torch.bfloat16)
    plan.add_embedding_(out, tokens, SiteGroup(0, (0, 50), torch.tensor((0, 50), dtype=torch.int32)), 1.0)
    wanted = weights.a[tokens].double() * weights.scales[tokens, None]
    wanted[case.row_slots != 0] = 0
    assert_close(out, wanted)
