"""What stands between the products of a layer, in the interpreter, against kernels/reference.py."""

import pytest
import torch

from manylora.kernels import reference
from manylora.kernels.triton_elementwise import add_norm, silu_and_mul, turn_and_write
from tests.kernels.tolerance import TOLERANCES, assert_close, assert_same_bits

pytestmark = pytest.mark.interpreted
by_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


@by_dtype
@pytest.mark.parametrize("width", [1, 96, 200])
@pytest.mark.parametrize("has_added", [False, True])
def test_the_stream_is_added_to_and_normed(dtype: torch.dtype, width: int, has_added: bool) -> None:
    given, weight = torch.randn(3, 2 * width).to(dtype), torch.rand(width).to(dtype)
    stream, added = given[:, :width], torch.randn(3, width).to(dtype) if has_added else None
    summed = stream.double() + added.double() if added is not None else stream.double()
    kept = given[:, width:].clone()
    out = add_norm(stream, added, weight, 1e-5)
    assert_close(stream, summed)  # the interpreter cuts off where a device rounds
    assert_same_bits(given[:, width:], kept)
    assert_close(out, reference.rms_norm(stream, weight, 1e-5))


@by_dtype
@pytest.mark.parametrize(("width", "rotary"), [(2, 2), (48, 32), (64, 64)])
def test_queries_and_keys_are_turned_and_the_cache_is_written(dtype: torch.dtype, width: int, rotary: int) -> None:
    heads, num_kv, size = 3, 2, 4
    qkv = torch.randn(4, (heads + 2 * num_kv) * width).to(dtype)
    angles = torch.rand(4, rotary)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    keys, values = (torch.full((3, num_kv, size, width), 7.0, dtype=dtype) for _ in range(2))
    slots = torch.tensor([9, -1, 0, 7])
    q = turn_and_write(qkv, cos, sin, keys, values, slots)
    parts = qkv.view(4, -1, width)
    turned = reference.rope(parts[:, : heads + num_kv], cos, sin)
    assert_close(q, turned[:, :heads])
    untouched = torch.ones(3, size, dtype=torch.bool)
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            untouched[slot // size, slot % size] = False
            assert_close(keys[slot // size, :, slot % size], turned[t, heads:])
            assert_same_bits(values[slot // size, :, slot % size], parts[t, heads + num_kv :])
    for cache in (keys, values):
        assert (cache.transpose(1, 2)[untouched] == 7).all()


@by_dtype
@pytest.mark.parametrize("width", [1, 1030])
def test_gates_open_as_the_activation_says(dtype: torch.dtype, width: int) -> None:
    given = torch.randn(3, 2 * width).to(dtype) * 3
    assert_close(silu_and_mul(given), reference.silu_and_mul(given))
