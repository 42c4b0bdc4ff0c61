"""The base's matmul over packed panels."""

import pytest
import torch

from manylora.kernels import native
from manylora.kernels.reference import linear
from manylora.kernels.weights import pack_panels
from tests.kernels.tolerance import assert_close, assert_same_bits

SHAPES = [(1, 1), (7, 5), (64, 64), (97, 203), (576, 130), (1536, 64)]


def case(rows: int, in_features: int, out_features: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, in_features, generator=generator)
    weight = torch.randn(out_features, in_features, generator=generator) / in_features**0.5
    return x.to(dtype), weight.to(dtype)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 13, 32, 67, 130])
def test_product_is_right_for_every_number_of_rows(cpu_path: str, dtype: torch.dtype, rows: int) -> None:
    x, weight = case(rows, 200, 70, dtype)
    assert_close(native.linear(x, pack_panels(weight)), linear(x, weight))


@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_product_is_right_for_every_shape(
    cpu_path: str, dtype: torch.dtype, in_features: int, out_features: int
) -> None:
    x, weight = case(9, in_features, out_features, dtype)
    assert_close(native.linear(x, pack_panels(weight)), linear(x, weight))


def test_bias_is_added_before_the_rounding(cpu_path: str, dtype: torch.dtype) -> None:
    x, weight = case(9, 96, 70, dtype)
    bias = torch.randn(70)
    assert_close(native.linear(x, pack_panels(weight), bias), linear(x, weight, bias))


@pytest.mark.parametrize("gap", [1, 100])
def test_rows_may_lie_apart(cpu_path: str, dtype: torch.dtype, gap: int) -> None:
    x, weight = case(9, 100, 64, dtype)
    apart = torch.zeros(9, 100 + gap, dtype=dtype)[:, :100].copy_(x)
    assert_same_bits(native.linear(apart, pack_panels(weight)), native.linear(x, pack_panels(weight)))


def test_no_rows_give_no_rows(cpu_path: str, dtype: torch.dtype) -> None:
    assert native.linear(torch.zeros(0, 8, dtype=dtype), pack_panels(torch.ones(3, 8, dtype=dtype))).shape == (0, 3)


def test_a_rows_result_does_not_depend_on_the_rows_beside_it(cpu_path: str, dtype: torch.dtype) -> None:
    x, weight = case(67, 576, 1200, dtype)
    panels = pack_panels(weight)
    together = native.linear(x, panels)
    for count in (1, 2, 3, 5, 11):
        assert_same_bits(native.linear(x[:count], panels), together[:count])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_spoiled_row_moves_no_bit_of_its_neighbours(cpu_path: str, dtype: torch.dtype, value: float) -> None:
    x, weight = case(8, 101, 70, dtype)
    panels = pack_panels(weight)
    clean = native.linear(x, panels)
    x[2] = value
    actual = native.linear(x, panels)
    others = torch.arange(8) != 2
    assert not actual[2].isfinite().any()
    assert_same_bits(actual[others], clean[others])


def test_a_weight_of_another_shape_or_dtype_is_refused(cpu_path: str) -> None:
    panels = pack_panels(torch.ones(8, 64))
    with pytest.raises(ValueError, match="packed does not fit"):
        native.linear(torch.zeros(1, 70), panels)
    with pytest.raises(TypeError, match="packed must be"):
        native.linear(torch.zeros(1, 64, dtype=torch.bfloat16), panels)


def test_panels_hold_the_weight_in_the_kernels_order() -> None:
    weight = torch.arange(70 * 3, dtype=torch.float32).view(70, 3)
    panels = pack_panels(weight)
    assert panels.packed.shape == (2, 3, 64, 1)
    assert panels.packed[1, 2, 5, 0] == weight[69, 2]
    pairs = pack_panels(weight.bfloat16())
    assert pairs.packed.shape == (2, 2, 64, 2)
    assert pairs.packed[0, 0, 7].tolist() == weight[7, :2].tolist()
    assert not pairs.packed[1, :, 6:].any()
