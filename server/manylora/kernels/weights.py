"""The formats of a base's matrices: what each costs in precision, and how its weights lie for the C++ kernels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import torch

__all__ = [
    "FORMATS",
    "INT8_DEPTH",
    "PANEL_WIDTH",
    "Int8",
    "Int8Weight",
    "PanelWeight",
    "Tolerance",
    "WeightFormat",
    "Whole",
    "choose_group_size",
    "pack_int8",
    "pack_panels",
]

PANEL_WIDTH = 64  # outputs that lie side by side
INT8_DEPTH = 4  # inputs that one instruction multiplies and adds
MAX_GROUP_SIZE = 192
_MIN_GROUP_SIZE = 64
_LARGEST = 127


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far what is computed with a format's weights may be from what the checkpoint's own give; checked at start.

    `model`: root mean square of the logits' difference, as a share of their spread. `layer`: of one layer, between two
    ways to compute it, as a share of its change to the residual stream, beside a step of the stream's own format.
    `linear`: of one linear's outputs, as a share of their root mean square; None where nothing is rounded.
    """

    model: float
    layer: float
    linear: float | None = None


class WeightFormat(Protocol):
    """How the matrices of a base's linears are kept."""

    @property
    def name(self) -> str:
        """What the setting `quantization` calls it."""
        ...

    def tolerance(self, dtype: torch.dtype) -> Tolerance:
        """For a model that computes in `dtype`."""
        ...

    def beside(self, dtype: torch.dtype) -> torch.dtype:
        """What adapters are kept in unless told otherwise, beside a base that computes in `dtype`."""
        ...


@dataclass(frozen=True, slots=True)
class Whole:
    """As the checkpoint has them, in the type that the model computes in.

    In bfloat16 two correct orders of summation differ by some hundredths of the logits' spread after thirty layers; a
    wrong layer differs by tenths.
    """

    name: str = "none"

    def tolerance(self, dtype: torch.dtype) -> Tolerance:
        return _WHOLE[dtype]

    def beside(self, dtype: torch.dtype) -> torch.dtype:
        return dtype


_WHOLE: Final[Mapping[torch.dtype, Tolerance]] = {
    torch.float32: Tolerance(model=1e-3, layer=3e-5),
    torch.float16: Tolerance(model=2e-2, layer=5e-3),
    torch.bfloat16: Tolerance(model=1.5e-1, layer=3e-2),
}


@dataclass(frozen=True, slots=True)
class Int8:
    """Rounded to 8 bits once, as are the inputs in every step; see `Int8Weight`.

    The check's tokens are random, and random text is what rounding hurts most. It moves the logits of a deep model so
    far that their difference says little of a single linear; a good one's outputs differ by a hundredth.
    """

    name: str = "int8"

    def tolerance(self, dtype: torch.dtype) -> Tolerance:
        return Tolerance(model=5e-1, layer=max(_WHOLE[dtype].layer, 3e-2), linear=1e-1)

    def beside(self, dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if dtype is torch.float32 else dtype


FORMATS: Final[Mapping[str, WeightFormat]] = {each.name: each for each in (Whole(), Int8())}


@dataclass(frozen=True, slots=True)
class PanelWeight:
    """A weight [out_features, in_features], packed for `native.linear`.

    `packed` [ceil(out / 64), ceil(in / depth), 64, depth], zero beyond the ends. `depth` is 2 for bfloat16, since some
    CPUs multiply and add pairs of them, and 1 otherwise.
    """

    packed: torch.Tensor
    out_features: int

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def rows(self, begin: int, end: int, in_features: int) -> torch.Tensor:
        """The weight's rows from `begin` to `end`, [end - begin, in_features], as they were."""
        return _unpacked(self.packed, begin, end)[:, :in_features]


def _unpacked(packed: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """Rows of a weight in panels, in a copy that ends where its columns' padding does."""
    first = begin // PANEL_WIDTH
    panels = packed[first : -(-end // PANEL_WIDTH)]
    return panels.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[begin - first * PANEL_WIDTH :][: end - begin]


def pack_panels(weight: torch.Tensor) -> PanelWeight:
    """Copy `weight` [out, in], float32, bfloat16 or float16, into panels."""
    out_features, in_features = weight.shape
    depth = 2 if weight.dtype is torch.bfloat16 else 1
    rows, columns = -(-out_features // PANEL_WIDTH), -(-in_features // depth)
    padded = weight.new_zeros(rows * PANEL_WIDTH, columns * depth)
    padded[:out_features, :in_features] = weight
    packed = padded.view(rows, PANEL_WIDTH, columns, depth).permute(0, 2, 1, 3).contiguous()
    return PanelWeight(packed, out_features)


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A weight [out_features, in_features] in 8 bits, packed for `native.int8_linear`.

    A weight has one scale per output; an input one per row and group of inputs, since a few columns in front of a
    model's down projections are far larger than the rest and would cost the others their precision.

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
        return _unpacked(self.packed, 0, self.out_features)[:, : self.in_features]

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """What the integers of some rows stand for, float32 [end - begin, in_features]."""
        return _unpacked(self.packed, begin, end)[:, : self.in_features].float() * self.scales[begin:end, None]

    def dequantised(self) -> torch.Tensor:
        """What the integers stand for, float32 [out_features, in_features]."""
        return self.integers().float() * self.scales[:, None]


def choose_group_size(in_features: int) -> int:
    """The largest divisor of `in_features` from 64 to 192 that is a multiple of 4; 128 where there is none."""
    for size in range(MAX_GROUP_SIZE, _MIN_GROUP_SIZE - 1, -INT8_DEPTH):
        if in_features % size == 0:
            return size
    return 128


def pack_int8(weight: torch.Tensor, group_size: int | None = None) -> Int8Weight:
    """Quantise and pack `weight` [out, in] of any float dtype: each output's largest value becomes 127.

    `group_size`: how many inputs share a scale, a multiple of 4.
    """
    out_features, in_features = weight.shape
    size = choose_group_size(in_features) if group_size is None else group_size
    rows, columns = -(-out_features // PANEL_WIDTH), -(-in_features // INT8_DEPTH)
    scales = weight.abs().amax(dim=1).float() / _LARGEST
    steps = torch.where(scales > 0, 1 / scales, 0)
    integers = torch.zeros(rows * PANEL_WIDTH, columns * INT8_DEPTH, dtype=torch.int8)
    integers[:out_features, :in_features] = torch.round(weight.float() * steps[:, None]).to(torch.int8)
    groups = torch.split(integers, size, dim=1)
    sums = torch.stack([group.sum(dim=1, dtype=torch.int32) for group in groups])
    packed = integers.view(rows, PANEL_WIDTH, columns, INT8_DEPTH).permute(0, 2, 1, 3).contiguous()
    return Int8Weight(packed, scales, sums, in_features, size)
