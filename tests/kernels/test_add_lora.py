import pytest
import torch

from manylora.kernels import native
from manylora.lora.memory.device_memory import TableEntry
from tests.kernels.lora_case import DENSE, POPULARITIES, LoraCase, make_case
from tests.kernels.tolerance import assert_close, assert_same_bits


def run(case: LoraCase) -> torch.Tensor:
    out = case.out.clone()
    native.add_lora_(out, case.x, *case.arguments())
    return out


@pytest.mark.parametrize("rank", [1, 3, 8, 16, 64])
@pytest.mark.parametrize(("in_features", "width"), [(1, 1), (7, 5), (64, 96), (97, 203), (576, 1536)])
def test_delta_is_right_for_every_rank_and_width(
    cpu_path: str, dtype: torch.dtype, rank: int, in_features: int, width: int
) -> None:
    case = make_case(dtype, [rank] * 3, in_features=in_features, widths=(width,), rows=7)
    assert_close(run(case), case.expected())


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize(("in_features", "widths"), [(1, (1,)), (97, (203, 17)), (576, (192, 1536))])
@pytest.mark.parametrize(("rows", "popularity"), [(1, "identical"), (7, "distinct"), (75, "zipf")])
def test_weights_may_be_of_another_type_than_the_rows(
    cpu_path: str,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    in_features: int,
    widths: tuple[int, ...],
    rows: int,
    popularity: str,
) -> None:
    case = make_case(
        dtype, [16, 3, 64], in_features=in_features, widths=widths, rows=rows, popularity=popularity,
        weight_dtypes=[weight_dtype],
    )  # fmt: skip
    together = run(case)
    assert_close(together, case.expected())
    for t in range(0, rows, 11):
        assert_same_bits(run(case.only(slice(t, t + 1))), together[t : t + 1])


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.int8])
def test_large_adapters_of_another_type_are_split_over_threads_too(
    cpu_path: str, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    case = make_case(dtype, [250], in_features=4096, widths=(4099,), rows=3, popularity="identical",
                     weight_dtypes=[weight_dtype])  # fmt: skip
    assert_close(run(case), case.expected())


def test_one_batch_may_hold_adapters_of_every_type(cpu_path: str, dtype: torch.dtype) -> None:
    kinds = [torch.float32, torch.int8, torch.bfloat16, torch.float16]
    case = make_case(dtype, [8] * 12, in_features=96, widths=(96, 40), rows=90, weight_dtypes=kinds)
    assert_close(run(case), case.expected())


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("rows", [1, 2, 5, 33, 130])
def test_delta_is_right_for_every_mix_of_rows(cpu_path: str, dtype: torch.dtype, rows: int, popularity: str) -> None:
    case = make_case(dtype, [1, 64, 3, 16, 8], rows=rows, popularity=popularity)
    assert_close(run(case), case.expected())


def test_linears_that_share_their_input_get_each_its_own_delta(cpu_path: str, dtype: torch.dtype) -> None:
    case = make_case(dtype, [4, 16, 1], widths=(48, 17, 130), rows=40)
    assert_close(run(case), case.expected())


def test_members_without_an_adapter_stay_as_they_are(cpu_path: str, dtype: torch.dtype) -> None:
    case = make_case(dtype, [0, 8], widths=(32, 32), rows=6, popularity="distinct")
    actual = run(case)
    untouched = case.row_slots == 0
    assert_same_bits(actual[untouched], case.out[untouched])
    assert_same_bits(actual[:, :32], case.out[:, :32])
    assert_close(actual, case.expected())


def test_rows_of_the_base_keep_every_bit(cpu_path: str, dtype: torch.dtype) -> None:
    case = make_case(dtype, [8, 8], rows=9, popularity="base")
    kept = case.row_slots < 0
    assert_same_bits(run(case)[kept], case.out[kept])


def test_nothing_is_done_without_rows(cpu_path: str, dtype: torch.dtype) -> None:
    case = make_case(dtype, [8], rows=3)
    case.row_slots[:] = -1
    assert_same_bits(run(case), case.out)


@pytest.mark.parametrize("value", ["nan", "inf", "largest"])
def test_a_spoiled_adapter_moves_no_bit_of_its_neighbours(cpu_path: str, dtype: torch.dtype, value: str) -> None:
    case = make_case(dtype, [8, 16, 3], rows=40, popularity="distinct")
    clean = run(case)
    spoiled = case.weights[0][1]
    assert spoiled is not None
    for matrix in (spoiled.a, spoiled.b):
        assert matrix is not None
        matrix.fill_(torch.finfo(dtype).max if value == "largest" else float(value))
    others = case.row_slots != 1
    actual = run(case)
    assert_same_bits(actual[others], clean[others])
    assert not torch.isfinite(actual[~others]).any()


@pytest.mark.parametrize("width", [64, 203])
def test_a_rows_result_does_not_depend_on_the_rows_beside_it(cpu_path: str, dtype: torch.dtype, width: int) -> None:
    case = make_case(dtype, [16, 5], in_features=100, widths=(width,), rows=75, popularity="identical")
    together = run(case)
    for t in range(0, 75, 7):
        assert_same_bits(run(case.only(slice(t, t + 1))), together[t : t + 1])


def test_few_rows_of_large_adapters_are_split_over_threads_without_a_difference(
    cpu_path: str, dtype: torch.dtype
) -> None:
    case = make_case(dtype, [256], in_features=4096, widths=(4099,), rows=1)
    assert_close(run(case), case.expected())
    many = make_case(dtype, [256], in_features=4096, widths=(4099,), rows=200, popularity="identical")
    assert_same_bits(run(many.only(slice(1))), run(many)[:1])


def test_rows_may_lie_apart(cpu_path: str, dtype: torch.dtype) -> None:
    case = make_case(dtype, [8, 16], rows=12)
    wide_x = torch.zeros(12, 3 * case.x.shape[1], dtype=dtype)
    wide_out = torch.zeros(12, 2 * case.out.shape[1] + 5, dtype=dtype)
    x, out = wide_x[:, 7 : 7 + case.x.shape[1]], wide_out[:, 3 : 3 + case.out.shape[1]]
    x.copy_(case.x)
    out.copy_(case.out)
    native.add_lora_(out, x, *case.arguments())
    assert_close(out, case.expected())
    assert not wide_out[:, :3].any()
    assert not wide_out[:, 3 + case.out.shape[1] :].any()


def test_inputs_that_do_not_fit_together_are_refused(cpu_path: str) -> None:
    case = make_case(torch.float32, [8], rows=2)
    tables, offsets, order, slots, starts = case.arguments()
    with pytest.raises(TypeError, match="out must be"):
        native.add_lora_(case.out.half(), case.x, tables, offsets, order, slots, starts)
    with pytest.raises(ValueError, match="segment_starts"):
        native.add_lora_(case.out, case.x, tables, offsets, order, slots, starts[:1])
    with pytest.raises(IndexError, match="out_offsets must rise"):
        native.add_lora_(case.out[:, :8], case.x, tables, offsets, order, slots, starts)


@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize(("in_features", "widths"), [(1, (1,)), (97, (203, 17)), (576, (192, 1536))])
@pytest.mark.parametrize(("rows", "popularity"), [(1, "identical"), (7, "distinct"), (75, "zipf")])
def test_dense_matrices_are_multiplied_beside_low_rank_ones(
    cpu_path: str,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    in_features: int,
    widths: tuple[int, ...],
    rows: int,
    popularity: str,
) -> None:
    case = make_case(
        dtype, [DENSE, 8, DENSE, 0], in_features=in_features, widths=widths, rows=rows, popularity=popularity,
        weight_dtypes=[] if weight_dtype is None else [weight_dtype],
    )  # fmt: skip
    together = run(case)
    assert_close(together, case.expected())
    for t in range(0, rows, 11):
        assert_same_bits(run(case.only(slice(t, t + 1))), together[t : t + 1])


def test_a_row_of_low_rank_is_the_same_to_the_last_bit_beside_dense_ones(cpu_path: str, dtype: torch.dtype) -> None:
    case = make_case(dtype, [8, 8], in_features=96, widths=(40,), rows=40)
    mixed = make_case(dtype, [8, DENSE], in_features=96, widths=(40,), rows=40)
    mixed.weights[0][0], mixed.x, mixed.out = case.weights[0][0], case.x, case.out
    mixed.row_slots = case.row_slots
    mine = case.row_slots == 0
    assert mine.any()
    assert not mine.all()
    assert_same_bits(run(mixed)[mine], run(case)[mine])


def test_a_dense_matrix_with_too_few_rows_is_refused(cpu_path: str) -> None:
    case = make_case(torch.float32, [DENSE], in_features=24, widths=(16,), rows=2)
    tables = case.tables
    tables[..., TableEntry._fields.index("rank")] = 8
    with pytest.raises(ValueError, match="a dense matrix of 8 rows for 16 outputs"):
        native.add_lora_(case.out, case.x, tables, *case.arguments()[1:])
