"""The paged key-value cache: every layer's keys and values in fixed blocks."""

from dataclasses import dataclass

import torch

from manylora.kernels.kv_entries import entry_width


@dataclass(frozen=True, slots=True)
class KVShape:
    """One layer's share of a position: `num_heads` heads, whose keys have `head_dim` numbers and values `value_dim`."""

    num_heads: int
    head_dim: int
    value_dim: int

    @property
    def size(self) -> int:
        """Numbers of all its keys and values."""
        return self.num_heads * (self.head_dim + self.value_dim)


class KVCache:
    """`keys[layer]` and `values[layer]`: [num_blocks + 1, num_heads, block_size, head_dim or value_dim].

    In int8, with a scale behind the numbers of each entry (`kernels.kv_entries`).

    The last block is spare: it belongs to no sequence, so that a step can be tried without any.
    Blocks are never cleared: readers look at no position behind a sequence's length.
    """

    def __init__(
        self, shapes: list[KVShape], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        for shape in shapes:
            room = (num_blocks + 1, shape.num_heads, block_size)
            self.keys.append(torch.empty((*room, entry_width(shape.head_dim, dtype)), dtype=dtype, device=device))
            self.values.append(torch.empty((*room, entry_width(shape.value_dim, dtype)), dtype=dtype, device=device))

    @property
    def spare_block(self) -> int:
        return self.num_blocks


def bytes_per_block(shapes: list[KVShape], block_size: int, dtype: torch.dtype) -> int:
    """Keys and values of all layers, in bytes, for one block."""
    entries = sum(
        shape.num_heads * (entry_width(shape.head_dim, dtype) + entry_width(shape.value_dim, dtype)) for shape in shapes
    )
    return entries * block_size * dtype.itemsize
