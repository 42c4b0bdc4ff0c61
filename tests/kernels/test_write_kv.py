import pytest
import torch

from manylora.kernels import native, reference
from tests.kernels.tolerance import assert_same_bits


@pytest.mark.parametrize("head_dim", [1, 5, 64, 80])
def test_each_row_lands_in_its_slot_and_nowhere_else(cpu_path: str, dtype: torch.dtype, head_dim: int) -> None:
    k, v = torch.randn(2, 6, 3, head_dim).to(dtype)
    k_cache, v_cache = torch.zeros(2, 4, 3, 8, head_dim).to(dtype)
    slots = torch.tensor([31, 0, 9, 8, 16, 23])
    k_expected, v_expected = k_cache.clone(), v_cache.clone()
    native.write_kv(k, v, k_cache, v_cache, slots)
    reference.write_kv(k, v, k_expected, v_expected, slots.tolist())
    assert_same_bits(k_cache, k_expected)
    assert_same_bits(v_cache, v_expected)


def test_values_may_have_another_width_than_keys(cpu_path: str) -> None:
    k, v = torch.randn(3, 2, 5), torch.randn(3, 2, 9)
    k_cache, v_cache = torch.zeros(4, 2, 8, 5), torch.zeros(4, 2, 8, 9)
    expected = k_cache.clone(), v_cache.clone()
    slots = torch.tensor([31, 0, 9])
    native.write_kv(k, v, k_cache, v_cache, slots)
    reference.write_kv(k, v, *expected, slots.tolist())
    assert_same_bits(k_cache, expected[0])
    assert_same_bits(v_cache, expected[1])


def test_rows_without_a_slot_are_left_out(cpu_path: str, dtype: torch.dtype) -> None:
    k, v = torch.randn(2, 2, 1, 4).to(dtype)
    k_cache, v_cache = torch.zeros(2, 2, 1, 2, 4).to(dtype)
    native.write_kv(k, v, k_cache, v_cache, torch.tensor([-1, 3]))
    assert_same_bits(k_cache[1, 0, 1], k[1, 0])
    assert int((k_cache.abs().sum(-1) > 0).sum()) == 1


def test_keys_of_another_dtype_than_the_cache_are_refused(cpu_path: str) -> None:
    k = torch.zeros(1, 1, 4)
    cache = torch.zeros(1, 1, 2, 4, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="k_cache"):
        native.write_kv(k, k, cache, cache, torch.tensor([0]))
