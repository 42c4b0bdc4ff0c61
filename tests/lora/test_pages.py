"""Pages of whole adapters: zeros, aligned, and given back."""

import gc

import psutil
import pytest
import torch

from manylora.lora.memory.pages import zeros

MEGABYTE = 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("numel", [0, 1, 1000, 16 * 1024, 64 * 1024 + 1, 3 * MEGABYTE])
def test_zeros_of_every_size_and_format(numel: int, dtype: torch.dtype) -> None:
    made = zeros(numel, dtype)
    assert (made.shape, made.dtype) == ((numel,), dtype)
    assert not made.any()
    assert made.data_ptr() % 64 == 0
    made.fill_(3)
    assert bool((made == 3).all())


def own_bytes() -> int:
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


def test_memory_goes_back_at_once_whatever_stays_between() -> None:
    """Every second of many is dropped: on the heap, what is freed between others that stay is not given back."""
    made = [zeros(2 * MEGABYTE, torch.int8) for _ in range(64)]
    for each in made:
        each.fill_(1)
    full = own_bytes()
    del made[::2], each
    gc.collect()
    assert full - own_bytes() > 48 * MEGABYTE
    assert sum(int(each.sum()) for each in made) == 64 * MEGABYTE


def test_a_view_keeps_its_pages() -> None:
    made = zeros(MEGABYTE, torch.int8)
    made[-4:] = 7
    view = made[-4:].view(torch.float32)
    del made
    gc.collect()
    assert view.view(torch.int8).tolist() == [7] * 4
