"""How a key or value lies in the paged cache: as the model computes it, or rounded to 8 bits.

A rounded entry has a scale of its own, so that it depends on nothing but its token and head: neither on what else is in
a step nor on how a prompt was cut into chunks, and blocks can be shared as whole ones are.
"""

from typing import Final

import torch

from manylora.kernels.weights import Tolerance

__all__ = ["ROUNDED", "as_entries", "entry_width", "read_entries", "width_of"]

# How far a rounded cache may move what a model computes, beside what its weights' format may.
ROUNDED: Final = Tolerance(model=1.5e-1, layer=3e-2)

_SCALE_BYTES = 4  # a float32 behind the integers
_LARGEST = 127
_LEAST_SCALE = 1e-36  # below, there is nothing but zeros: a step's inverse would be infinite


def entry_width(width: int, dtype: torch.dtype) -> int:
    """Elements of `dtype` that an entry of `width` numbers takes in a cache."""
    return width if dtype.is_floating_point else width + _SCALE_BYTES


def width_of(cache: torch.Tensor) -> int:
    """Numbers of an entry of `cache` [blocks, heads, block_size, entry]."""
    return int(cache.shape[3]) - entry_width(0, cache.dtype)


def as_entries(values: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    """`values` [..., width] as they lie in `cache`, [..., entry] of its type.

    Rounded to integers up to 127 times a scale, which is that of the largest one in bfloat16: so float32 holds what is
    read back, and that is written as it was. A value that is not finite makes the whole entry NaN.
    """
    if cache.is_floating_point():
        return values.to(cache.dtype)
    wide = values.float()
    exact = wide.abs().amax(dim=-1, keepdim=True) / _LARGEST
    scale = torch.where(exact > _LEAST_SCALE, exact, 0).bfloat16().float()
    steps = torch.where(scale > 0, 1 / scale, 0)
    integers = (wide * steps).round().nan_to_num(0.0).to(torch.int8)
    scale += (wide * 0).sum(dim=-1, keepdim=True)
    return torch.cat((integers, scale.view(torch.int8)), dim=-1)


def read_entries(entries: torch.Tensor) -> torch.Tensor:
    """What entries [..., entry] of a cache stand for: [..., width], of rounded ones as float32."""
    if entries.is_floating_point():
        return entries
    scale = entries[..., -_SCALE_BYTES:].contiguous().view(torch.float32)
    return entries[..., :-_SCALE_BYTES].float() * scale
