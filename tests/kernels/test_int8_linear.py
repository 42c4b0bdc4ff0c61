import pytest
import torch

from manylora.kernels import native
from manylora.kernels.reference import int8_linear, linear
from manylora.kernels.weights import Int8Weight, choose_group_size, pack_int8
from tests.kernels.tolerance import assert_close, assert_same_bits


def on_the_grid(rows: int, weight: Int8Weight, dtype: torch.dtype) -> torch.Tensor:
    """Inputs that 8 bits hold exactly: integers up to 127 times a power of two, another for each row and group."""
    groups = -(-weight.in_features // weight.group_size)
    integers = torch.randint(-127, 128, (rows, groups, weight.group_size))
    integers[:, :, 0] = 127
    scaled = integers * 2.0 ** torch.randint(-8, -4, (rows, groups, 1))
    return scaled.flatten(1)[:, : weight.in_features].to(dtype)


@pytest.mark.parametrize(
    ("in_features", "out_features"), [(1, 1), (3, 5), (64, 64), (97, 203), (576, 192), (1536, 65), (131, 640)]
)
@pytest.mark.parametrize("rows", [1, 2, 7, 33, 130])
def test_inputs_that_fit_into_8_bits_are_multiplied_exactly(
    cpu_path: str, dtype: torch.dtype, rows: int, in_features: int, out_features: int
) -> None:
    weight = pack_int8(torch.randn(out_features, in_features) / in_features**0.5)
    x = on_the_grid(rows, weight, dtype)
    assert_close(native.int8_linear(x, weight), linear(x, weight.dequantised()))


def test_other_inputs_are_off_by_half_a_step_at_most(cpu_path: str, dtype: torch.dtype) -> None:
    weight = pack_int8(torch.randn(100, 576))
    x = torch.randn(40, 576).to(dtype)
    steps = x.view(40, 3, 192).double().abs().amax(dim=2) / 127
    weights = weight.dequantised().double().view(100, 3, 192).abs().sum(dim=2)
    wanted = linear(x, weight.dequantised())
    rounding = wanted.abs() * torch.finfo(dtype).eps + 1e-3
    assert ((native.int8_linear(x, weight).double() - wanted).abs() <= steps @ weights.T / 2 + rounding).all()


def test_extremes_of_both_sides_do_not_saturate(cpu_path: str, dtype: torch.dtype) -> None:
    weight = pack_int8(torch.cat([torch.full((64, 384), -1 / 384), torch.full((64, 384), 1 / 384)]))
    x = torch.cat([torch.ones(5, 384), -torch.ones(5, 384)]).to(dtype)
    assert_close(native.int8_linear(x, weight), int8_linear(x, weight))


def test_bias_is_added(cpu_path: str, dtype: torch.dtype) -> None:
    weight, bias = pack_int8(torch.randn(70, 128) / 12), torch.randn(70)
    x = on_the_grid(9, weight, dtype)
    assert_close(native.int8_linear(x, weight, bias), int8_linear(x, weight, bias))


def test_rows_may_lie_apart(cpu_path: str, dtype: torch.dtype) -> None:
    weight = pack_int8(torch.randn(64, 100) / 10)
    x = on_the_grid(9, weight, dtype).repeat(1, 3)[:, 100:200]
    assert_close(native.int8_linear(x, weight), int8_linear(x, weight))


def test_zeros_give_the_bias(cpu_path: str, dtype: torch.dtype) -> None:
    weight, bias = pack_int8(torch.zeros(8, 16)), torch.arange(8.0)
    assert_close(native.int8_linear(torch.zeros(3, 16, dtype=dtype), weight, bias), bias.expand(3, 8))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_spoiled_row_is_nan_and_its_neighbours_keep_every_bit(
    cpu_path: str, dtype: torch.dtype, value: float
) -> None:
    weight = pack_int8(torch.randn(64, 192))
    x = torch.randn(6, 192).to(dtype)
    clean = native.int8_linear(x, weight)
    x[2, 5] = value
    actual = native.int8_linear(x, weight)
    assert actual[2].isnan().all()
    others = torch.arange(6) != 2
    assert_same_bits(actual[others], clean[others])


def test_a_rows_result_does_not_depend_on_the_rows_beside_it(cpu_path: str, dtype: torch.dtype) -> None:
    weight = pack_int8(torch.randn(1200, 576))
    x = torch.randn(67, 576).to(dtype)
    together = native.int8_linear(x, weight)
    for t in range(0, 67, 11):
        assert_same_bits(native.int8_linear(x[t : t + 1], weight), together[t : t + 1])


@pytest.mark.parametrize(("in_features", "size"), [(576, 192), (1536, 192), (4096, 128), (896, 128), (97, 128)])
def test_group_size_divides_the_inputs_where_it_can(in_features: int, size: int) -> None:
    assert choose_group_size(in_features) == size


def test_one_large_column_does_not_cost_the_other_groups_their_precision(cpu_path: str) -> None:
    weight = torch.randn(64, 384) / 20
    x = torch.randn(16, 384)
    x[:, 0] *= 1000
    wanted = x[:, 192:] @ weight[:, 192:].T
    weight[:, :192] = 0
    error = (native.int8_linear(x, pack_int8(weight)) - wanted).abs().mean() / wanted.abs().mean()
    one_group = (native.int8_linear(x, pack_int8(weight, group_size=384)) - wanted).abs().mean() / wanted.abs().mean()
    assert error < 0.02
    assert one_group > 0.3


def test_unpacking_gives_the_weight_back_within_half_a_step() -> None:
    weight = torch.randn(70, 101)
    packed = pack_int8(weight)
    assert packed.packed.shape == (2, 26, 64, 4)
    assert ((packed.dequantised() - weight).abs() <= packed.scales[:, None] * 0.501).all()


def test_a_weight_of_another_shape_is_refused(cpu_path: str) -> None:
    with pytest.raises(ValueError, match="packed does not fit"):
        native.int8_linear(torch.zeros(1, 70), pack_int8(torch.ones(8, 64)))
