"""Memory of whole adapters, in pages of its own.

Adapters come and go by the megabyte and live for very different times. On the heap, glibc soon stops mapping blocks of
such sizes one by one (its threshold follows the largest block that was freed), and what is freed between others that
stay is room that fits no other: the process grows by hundreds of megabytes that hold nothing.
"""

import math
import mmap
from typing import Final

import torch

_LEAST_BYTES: Final = 64 * 1024  # smaller ones are no trouble, and pages would waste much of theirs


def zeros(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """[numel] zeros on the CPU. Pages that were never written cost no memory; all go back with the last reference."""
    size = numel * dtype.itemsize
    if size < _LEAST_BYTES:
        return torch.zeros(numel, dtype=dtype)
    pages = mmap.mmap(-1, math.ceil(size / mmap.PAGESIZE) * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype, count=numel)
