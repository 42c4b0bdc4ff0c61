"""The base's linears in 8 bits: weights quantised once, inputs as they come, sums in 32-bit integers.

A weight has one scale per output; an input one per row and group of inputs, since a few columns in front of a
model's down projections are far larger than the rest and would cost the others their precision.
"""

from dataclasses import dataclass

import torch

from manylora.kernels.weights import PANEL_WIDTH

DEPTH = 4  # inputs that one instruction multiplies and adds
MAX_GROUP_SIZE = 192
_MIN_GROUP_SIZE = 64
_LARGEST = 127


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A weight [out_features, in_features], packed for `native.int8_linear`.

    `packed` int8 [ceil(out / 64), ceil(in / 4), 64, 4], zero beyond the ends. `scales` float32 [out_features].
    `group_sums` int32 [groups, out_features rounded up to 64]: the sum of each output's integers in each group.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    group_sums: torch.Tensor
    in_features: int
    group_size: int

    @property
    def out_features(self) -> int:
        return len(self.scales)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes + self.group_sums.nbytes

    def integers(self) -> torch.Tensor:
        """The quantised weight, int8 [out_features, in_features]."""
        rows = self.packed.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
        return rows[: self.out_features, : self.in_features]

    def dequantised(self) -> torch.Tensor:
        """What the integers stand for, float32 [out_features, in_features]."""
        return self.integers().float() * self.scales[:, None]


def choose_group_size(in_features: int) -> int:
    """The largest divisor of `in_features` from 64 to 192 that is a multiple of 4; 128 where there is none."""
    for size in range(MAX_GROUP_SIZE, _MIN_GROUP_SIZE - 1, -DEPTH):
        if in_features % size == 0:
            return size
    return 128


def pack_int8(weight: torch.Tensor, group_size: int | None = None) -> Int8Weight:
    """Quantise and pack `weight` [out, in] of any float dtype: each output's largest value becomes 127.

    `group_size`: how many inputs share a scale, a multiple of 4.
    """
    out_features, in_features = weight.shape
    size = choose_group_size(in_features) if group_size is None else group_size
    rows, columns = -(-out_features // PANEL_WIDTH), -(-in_features // DEPTH)
    scales = weight.abs().amax(dim=1).float() / _LARGEST
    steps = torch.where(scales > 0, 1 / scales, 0)
    integers = torch.zeros(rows * PANEL_WIDTH, columns * DEPTH, dtype=torch.int8)
    integers[:out_features, :in_features] = torch.round(weight.float() * steps[:, None]).to(torch.int8)
    groups = torch.split(integers, size, dim=1)
    sums = torch.stack([group.sum(dim=1, dtype=torch.int32) for group in groups])
    packed = integers.view(rows, PANEL_WIDTH, columns, DEPTH).permute(0, 2, 1, 3).contiguous()
    return Int8Weight(packed, scales, sums, in_features, size)
