import pytest
import torch
from gguf import GGMLQuantizationType, quants

from manylora.kernels import native
from manylora.kernels.reference import int4_linear, linear
from manylora.kernels.weights import INT4_GROUP, Int4Weight, pack_int4, pack_nibbles
from tests.kernels.tolerance import assert_close, assert_same_bits


def on_the_grid(rows: int, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """Inputs that 8 bits hold exactly: integers up to 127 times a power of two, another for each row and block."""
    blocks = -(-in_features // INT4_GROUP)
    integers = torch.randint(-127, 128, (rows, blocks, INT4_GROUP))
    integers[:, :, 0] = 127
    scaled = integers * 2.0 ** torch.randint(-8, -4, (rows, blocks, 1))
    return scaled.flatten(1)[:, :in_features].to(dtype)


def symmetric(out_features: int, in_features: int, group_size: int) -> Int4Weight:
    integers = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8)
    scales = torch.rand(out_features, -(-in_features // group_size)) / in_features**0.5
    return pack_nibbles(integers, scales, None, group_size)


@pytest.mark.parametrize(
    ("in_features", "out_features"), [(1, 1), (3, 5), (64, 64), (97, 203), (576, 192), (1536, 65), (131, 640)]
)
@pytest.mark.parametrize("rows", [1, 2, 7, 33, 130])
def test_inputs_that_fit_into_8_bits_are_multiplied_exactly(
    cpu_path: str, dtype: torch.dtype, rows: int, in_features: int, out_features: int
) -> None:
    weight = pack_int4(torch.randn(out_features, in_features) / in_features**0.5)
    x = on_the_grid(rows, in_features, dtype)
    assert_close(native.int4_linear(x, weight), linear(x, weight.dequantised()))


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_groups_of_more_inputs_and_without_offsets(cpu_path: str, dtype: torch.dtype, group_size: int) -> None:
    x = on_the_grid(5, 200, dtype)
    for weight in (pack_int4(torch.randn(70, 200) / 14, group_size), symmetric(70, 200, group_size)):
        assert_close(native.int4_linear(x, weight), linear(x, weight.dequantised()))


def test_other_inputs_are_off_by_half_a_step_at_most(cpu_path: str, dtype: torch.dtype) -> None:
    weight = pack_int4(torch.randn(100, 576))
    x = torch.randn(40, 576).to(dtype)
    steps = x.view(40, 18, 32).double().abs().amax(dim=2) / 127
    weights = weight.dequantised().double().view(100, 18, 32).abs().sum(dim=2)
    wanted = linear(x, weight.dequantised())
    rounding = wanted.abs() * torch.finfo(dtype).eps + 1e-3
    assert ((native.int4_linear(x, weight).double() - wanted).abs() <= steps @ weights.T / 2 + rounding).all()


def test_extremes_of_both_sides_do_not_saturate(cpu_path: str, dtype: torch.dtype) -> None:
    integers = torch.cat([torch.zeros(64, 384), torch.full((64, 384), 15.0)]).to(torch.uint8)
    ends = torch.full((128, 12), 1 / 384)
    weight = pack_nibbles(integers, ends / 7.5, -ends, 32)
    x = torch.cat([torch.ones(5, 384), -torch.ones(5, 384)]).to(dtype)
    assert_close(native.int4_linear(x, weight), int4_linear(x, weight))


def test_bias_is_added_and_rows_may_lie_apart(cpu_path: str, dtype: torch.dtype) -> None:
    weight, bias = pack_int4(torch.randn(70, 100) / 10), torch.randn(70)
    x = on_the_grid(9, 100, dtype).repeat(1, 3)[:, 100:200]
    assert_close(native.int4_linear(x, weight, bias), int4_linear(x, weight, bias))


@pytest.mark.parametrize("value", [0.0, 1e-38, -1e-41])
def test_next_to_nothing_gives_the_bias(cpu_path: str, dtype: torch.dtype, value: float) -> None:
    weight, bias = pack_int4(torch.randn(8, 40)), torch.arange(8.0)
    x = torch.full((3, 40), value, dtype=dtype)
    assert_close(native.int4_linear(x, weight, bias), bias.expand(3, 8))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_spoiled_row_is_nan_and_its_neighbours_keep_every_bit(
    cpu_path: str, dtype: torch.dtype, value: float
) -> None:
    weight = pack_int4(torch.randn(64, 192))
    x = torch.randn(6, 192).to(dtype)
    clean = native.int4_linear(x, weight)
    x[2, 5] = value
    actual = native.int4_linear(x, weight)
    assert actual[2].isnan().all()
    others = torch.arange(6) != 2
    assert_same_bits(actual[others], clean[others])


def test_a_rows_result_does_not_depend_on_the_rows_beside_it(cpu_path: str, dtype: torch.dtype) -> None:
    weight = pack_int4(torch.randn(1200, 584))
    x = torch.randn(67, 584).to(dtype)
    together = native.int4_linear(x, weight)
    for t in range(0, 67, 11):
        for count in range(1, 7):
            assert_same_bits(native.int4_linear(x[t : t + count], weight), together[t : t + count])


def test_a_weight_of_another_shape_is_refused(cpu_path: str) -> None:
    with pytest.raises(ValueError, match="packed does not fit"):
        native.int4_linear(torch.zeros(1, 70), pack_int4(torch.ones(8, 64)))


@pytest.mark.parametrize("shape", [(70, 101), (1, 1), (64, 32), (3, 4096)])
def test_weights_of_16_steps_come_back_as_they_were(shape: tuple[int, int]) -> None:
    """As in a checkpoint that was made of 4 bits: rounding once more costs what float16 scales cost."""
    out_features, in_features = shape
    groups = -(-in_features // INT4_GROUP)
    integers = torch.randint(0, 16, (out_features, groups, INT4_GROUP))
    integers[:, :, 0], integers[:, :, 1] = 0, 15
    whole = (integers * torch.rand(out_features, groups, 1) - 4).flatten(1)[:, :in_features]
    packed = pack_int4(whole)
    assert packed.packed.shape == (-(-out_features // 64), -(-in_features // 8), 64, 4)
    torch.testing.assert_close(packed.dequantised(), whole, rtol=2e-3, atol=8e-3)
    torch.testing.assert_close(packed.rows(0, out_features), packed.dequantised(), rtol=0, atol=0)


def test_integers_come_back_from_their_nibbles_in_whatever_rows_are_asked_for() -> None:
    integers = torch.randint(0, 16, (130, 50), dtype=torch.uint8)
    scales, offsets = torch.ones(130, 2), torch.zeros(130, 2)
    packed = pack_nibbles(integers, scales, offsets, 32)
    assert torch.equal(packed.dequantised(), integers.float())
    assert torch.equal(packed.rows(60, 131 - 2), integers[60:129].float())
    assert torch.equal(pack_nibbles(integers, scales, None, 32).rows(65, 66), integers[65:66].float() - 8)


def test_the_share_of_a_groups_range_that_fits_best_is_taken() -> None:
    """Against groups whose ends are 0 and 15: a tail of one value costs less when it is cut off."""
    torch.manual_seed(0)
    weight = torch.randn(256, 512)
    low, high = weight.view(256, 16, 32).aminmax(dim=2, keepdim=True)
    step = (high - low) / 15
    to_ends = (((weight.view(256, 16, 32) - low) / step).round() * step + low).view(256, 512)
    found = (pack_int4(weight).dequantised() - weight).square().mean()
    assert found < 0.9 * (to_ends - weight).square().mean()


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_a_group_of_one_value_is_that_value(value: float) -> None:
    assert torch.equal(pack_int4(torch.full((3, 70), value)).dequantised(), torch.full((3, 70), value))


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1])
def test_a_weight_of_a_gguf_file_keeps_its_integers(kind: GGMLQuantizationType) -> None:
    """Whose blocks do not all reach from 0 to 15."""
    torch.manual_seed(0)
    blocks = quants.quantize((torch.randn(70, 96) / 20).numpy(), kind)
    whole = torch.from_numpy(quants.dequantize(blocks, kind)).bfloat16()
    found = pack_int4(whole).dequantised()
    torch.testing.assert_close(found, whole.float(), rtol=2**-7, atol=2e-4)
