import pytest
import torch
from torch.nn import functional

from manylora.kernels import native, reference
from tests.kernels.tolerance import assert_close, assert_same_bits

WIDTHS = [1, 5, 16, 31, 576, 1000]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm_is_right_for_every_width(cpu_path: str, dtype: torch.dtype, rows: int, width: int, offset: float) -> None:
    x, weight = (3 * torch.randn(rows, width)).to(dtype), torch.randn(width).to(dtype)
    assert_close(native.rms_norm(x, weight, 1e-5, offset), reference.rms_norm(x, weight, 1e-5, offset))


def test_norm_is_rounded_before_the_weight_as_in_hugging_face(cpu_path: str, dtype: torch.dtype) -> None:
    x, weight = torch.randn(50, 576).to(dtype), torch.randn(576).to(dtype)
    scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    same = native.rms_norm(x, weight, 1e-5) == weight * scaled.to(dtype)
    # Sums in another order move a few; one rounding instead of two would move a quarter (in float32 any may move).
    assert same.float().mean() > (0.98 if dtype != torch.float32 else 0.2)


@pytest.mark.parametrize("width", WIDTHS)
def test_fused_norm_adds_to_the_residual_first(cpu_path: str, dtype: torch.dtype, width: int) -> None:
    x, residual, weight = (torch.randn(shape).to(dtype) for shape in ((9, width), (9, width), (width,)))
    total = x + residual
    actual = native.add_rms_norm_(residual, x, weight, 1e-5)
    assert_same_bits(residual, total)
    assert_close(actual, reference.rms_norm(total, weight, 1e-5))


def test_a_row_of_nan_does_not_touch_its_neighbours_norm(cpu_path: str, dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 40).to(dtype), torch.ones(40, dtype=dtype)
    clean = native.rms_norm(x, weight, 1e-5)
    x[1] = float("nan")
    actual = native.rms_norm(x, weight, 1e-5)
    assert actual[1].isnan().all()
    assert_same_bits(actual[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 70])
def test_silu_gates_the_other_half(cpu_path: str, dtype: torch.dtype, rows: int, width: int) -> None:
    gate_up = (4 * torch.randn(rows, 2 * width)).to(dtype)
    assert_close(native.silu_and_mul(gate_up), reference.silu_and_mul(gate_up))


@pytest.mark.parametrize("width", WIDTHS)
def test_gelu_gates_the_other_half(cpu_path: str, dtype: torch.dtype, width: int) -> None:
    gate_up = (4 * torch.randn(7, 2 * width)).to(dtype)
    assert_close(native.gelu_tanh_and_mul(gate_up), reference.gelu_tanh_and_mul(gate_up))


def test_silu_of_large_numbers_neither_overflows_nor_becomes_nan(cpu_path: str) -> None:
    gate = torch.tensor([[-1e4, -100.0, -88.0, 0.0, 88.0, 100.0, 1e4]])
    gate_up = torch.cat([gate, torch.ones_like(gate)], dim=1)
    assert_close(native.silu_and_mul(gate_up), functional.silu(gate.double()))


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (10, 6), (96, 96), (7, 2), (5, 0)])
@pytest.mark.parametrize("tokens", [1, 60])
def test_queries_and_keys_are_turned_and_stored(
    cpu_path: str, dtype: torch.dtype, tokens: int, head_dim: int, rotary_dim: int
) -> None:
    heads, kv_heads, block_size = 6, 2, 8
    fused = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(dtype)
    q, k, v = torch.split(fused, [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=1)
    q, k, v = (t.view(tokens, -1, head_dim) for t in (q, k, v))
    angle = torch.rand(tokens, rotary_dim) * 6
    cos, sin = angle.cos(), angle.sin()
    k_cache, v_cache = torch.zeros(2, 10, kv_heads, block_size, head_dim).to(dtype)
    slots = torch.randperm(80)[:tokens]
    slots[0] = -1
    out = native.rope_write_kv(q, k, v, cos, sin, k_cache, v_cache, slots)
    assert_close(out, reference.rope(q, cos, sin))
    k_expected, v_expected = torch.zeros(2, 10, kv_heads, block_size, head_dim, dtype=torch.float64)
    reference.write_kv(reference.rope(k, cos, sin), v, k_expected, v_expected, slots.tolist())
    assert_close(k_cache, k_expected)
    assert_same_bits(v_cache, v_expected.to(dtype))


def test_angles_of_another_dtype_are_refused(cpu_path: str) -> None:
    x = torch.zeros(1, 1, 4)
    cache = torch.zeros(1, 1, 2, 4)
    with pytest.raises(TypeError, match="cos"):
        native.rope_write_kv(x, x, x, torch.zeros(1, 4).half(), torch.zeros(1, 4), cache, cache, torch.tensor([0]))
