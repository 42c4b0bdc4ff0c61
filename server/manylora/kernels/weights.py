"""The formats of a base's matrices: what each costs in precision, and how its weights lie for the C++ kernels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import torch

__all__ = [
    "FORMATS",
    "INT4_DEPTH",
    "INT4_GROUP",
    "INT8_DEPTH",
    "PANEL_WIDTH",
    "Int4",
    "Int4Weight",
    "Int8",
    "Int8Weight",
    "PanelWeight",
    "Tolerance",
    "WeightFormat",
    "Whole",
    "choose_group_size",
    "pack_int4",
    "pack_int8",
    "pack_nibbles",
    "pack_panels",
]

PANEL_WIDTH = 64  # outputs that lie side by side
INT8_DEPTH = 4  # inputs that one instruction multiplies and adds
INT4_DEPTH = 8  # as many again lie in the other halves of the bytes
INT4_GROUP = 32  # inputs that share a scale; larger groups are multiples of it
MAX_GROUP_SIZE = 192
_MIN_GROUP_SIZE = 64
_LARGEST = 127
_LARGEST_NIBBLE = 15
_NIBBLE_ZERO = 8  # what stands for 0 where groups have no offset
_STEPS = range(15, 6, -1)  # in how many steps a group's range may be cut by who rounded it before
_PROBED = 64  # rows that say whether a weight was
_IS_GRID = 0.002  # of a group's squares, what its best grid leaves at most where it was: bfloat16's rounding and less
_AT_A_TIME = 1 << 18  # weights that are rounded together: their copies stay in the caches


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

    def widened(self, other: "Tolerance") -> "Tolerance":
        """As far as both allow together, but for a single linear."""
        return Tolerance(self.model + other.model, self.layer + other.layer, self.linear)


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

    def nbytes(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """What a weight [out_features, in_features] of a model that computes in `dtype` takes, in the panels' order."""
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

    def nbytes(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        return _up(out_features, PANEL_WIDTH) * in_features * dtype.itemsize


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

    def nbytes(self, out_features: int, in_features: int, _dtype: torch.dtype) -> int:
        groups = -(-in_features // choose_group_size(in_features))
        rows = _up(out_features, PANEL_WIDTH)
        return rows * _up(in_features, INT8_DEPTH) + 4 * (out_features + rows * groups)


@dataclass(frozen=True, slots=True)
class Int4:
    """Rounded to 4 bits once, in groups of 32 inputs with a scale and an offset each; see `Int4Weight`.

    Inputs are rounded to 8 bits in every step, and the weights of what makes the logits once. Of random text the logits
    move by most of their spread, so it is the single linears that say whether a base was rounded well.
    """

    name: str = "int4"

    def tolerance(self, dtype: torch.dtype) -> Tolerance:
        return Tolerance(model=1.0, layer=max(_WHOLE[dtype].layer, 3e-2), linear=2e-1)

    def beside(self, dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if dtype is torch.float32 else dtype

    def nbytes(self, out_features: int, in_features: int, _dtype: torch.dtype) -> int:
        groups = -(-in_features // INT4_GROUP)
        return _up(out_features, PANEL_WIDTH) * (_up(in_features, INT4_DEPTH) // 2 + 4 * groups)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


FORMATS: Final[Mapping[str, WeightFormat]] = {each.name: each for each in (Whole(), Int8(), Int4())}


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


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """A weight [out_features, in_features] in 4 bits, packed for `native.int4_linear`.

    What an integer q from 0 to 15 stands for is scale * q + offset, by output and group of inputs.

    `packed` uint8 [ceil(out / 64), ceil(in / 8), 64, 4], zero beyond the ends: of 8 inputs the first four are the lower
    halves of the bytes. `scales` float16 [ceil(out / 64), groups, 2, 64]: scales, then offsets; or [.., 1, 64] where
    every offset is -8 scales.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    out_features: int
    in_features: int
    group_size: int

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """What the integers of some rows stand for, float32 [end - begin, in_features]."""
        first, last = begin // PANEL_WIDTH, -(-end // PANEL_WIDTH)
        packed, scales = self.packed[first:last], self.scales[first:last].float()
        halves = torch.stack((packed & _LARGEST_NIBBLE, packed >> 4), dim=3)  # [panels, steps, 64, 2, 4]
        integers = halves.permute(0, 2, 1, 3, 4).flatten(2)[:, :, : self.in_features].float()
        groups = torch.arange(self.in_features, device=packed.device) // self.group_size
        scale = scales[:, :, 0].transpose(1, 2)[:, :, groups]
        offset = scales[:, :, 1].transpose(1, 2)[:, :, groups] if scales.shape[2] > 1 else -_NIBBLE_ZERO * scale
        found = (integers * scale + offset).flatten(0, 1)
        return found[begin - first * PANEL_WIDTH :][: end - begin]

    def dequantised(self) -> torch.Tensor:
        """What the integers stand for, float32 [out_features, in_features]."""
        return self.rows(0, self.out_features)


def pack_nibbles(
    integers: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None, group_size: int
) -> Int4Weight:
    """Pack `integers` [out, in] from 0 to 15, with scales and offsets [out, groups]; those of None are -8 scales."""
    out_features, in_features = integers.shape
    rows, steps = -(-out_features // PANEL_WIDTH), -(-in_features // INT4_DEPTH)
    padded = integers.new_zeros((rows * PANEL_WIDTH, steps * INT4_DEPTH), dtype=torch.uint8)
    padded[:out_features, :in_features] = integers
    low, high = padded.view(rows, PANEL_WIDTH, steps, 2, INT4_DEPTH // 2).permute(3, 0, 2, 1, 4)
    parts = [scales] if offsets is None else [scales, offsets]
    kept = scales.new_zeros((len(parts), rows * PANEL_WIDTH, scales.shape[1]), dtype=torch.float16)
    for part, values in zip(kept, parts, strict=True):
        part[:out_features] = values
    kept = kept.view(len(parts), rows, PANEL_WIDTH, -1).permute(1, 3, 0, 2).contiguous()
    return Int4Weight((low | high << 4).contiguous(), kept, out_features, in_features, group_size)


def pack_int4(weight: torch.Tensor, group_size: int = INT4_GROUP) -> Int4Weight:
    """Quantise and pack `weight` [out, in] of any float dtype.

    Of a few shares of each group's range the one is taken that leaves the smallest squares of errors, each with the
    scale and the offset that fit its integers best. A weight that was rounded to 16 steps before (as GGUF, GPTQ and AWQ
    do) is recognised, and gets its own integers back. `group_size`: how many inputs share them, a multiple of 32.
    """
    out_features, in_features = weight.shape
    groups = -(-in_features // group_size)
    shares = _shares_of(weight, group_size)
    integers = torch.empty((out_features, in_features), dtype=torch.uint8, device=weight.device)
    scales, offsets = (torch.empty((out_features, groups), dtype=torch.float16, device=weight.device) for _ in range(2))
    at_a_time = max(1, _AT_A_TIME // max(1, in_features))
    for begin in range(0, out_features, at_a_time):
        some = slice(begin, begin + at_a_time)
        found = _round_groups(_in_groups(weight[some], group_size), shares)
        integers[some] = found[0].flatten(1)[:, :in_features]
        scales[some], offsets[some] = found[1][..., 0], found[2][..., 0]
    return pack_nibbles(integers, scales, offsets, group_size)


def _in_groups(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """Rows as float32 [n, groups, group_size]; a short last group is filled with its last value."""
    values = weight.float()
    short = -values.shape[1] % group_size
    values = torch.cat((values, values[:, -1:].expand(-1, short)), dim=1) if short else values
    return values.view(len(values), -1, group_size)


@dataclass(frozen=True, slots=True)
class _Shares:
    """Shares of a group's range to try, and what part of its squares may be left for the others not to be tried."""

    tried: tuple[float, ...]
    enough: float


_CUTS: Final = _Shares((1.0, 0.95, 0.9, 0.85), 0.0)
_GRIDS: Final = _Shares(tuple(_LARGEST_NIBBLE / steps for steps in _STEPS), _IS_GRID)


def _shares_of(weight: torch.Tensor, group_size: int) -> _Shares:
    """Which shares of a group's range to try: cutting it, or, of a weight that has 16 steps, all that these may be."""
    values = _in_groups(weight[:: max(1, len(weight) // _PROBED)], group_size)
    integers, scale, offset = _round_groups(values, _GRIDS)
    left = (integers * scale.float() + offset.float() - values).square().sum(dim=2)
    whole = (values - values.mean(dim=2, keepdim=True)).square().sum(dim=2)
    return _GRIDS if float((left <= _IS_GRID * whole).float().mean()) > 0.9 else _CUTS


def _round_groups(values: torch.Tensor, shares: _Shares) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers of float32 [n, groups, size], and what they are multiplied by and added to, float16 [n, groups, 1].

    A share below 1 cuts a group's range off on both sides; one above leaves steps beyond its upper end unused.
    """
    mean = values.mean(dim=2, keepdim=True)
    whole = (values - mean).square_().sum(dim=2, keepdim=True)
    gain, scale, offset = torch.full_like(mean, -1.0), torch.zeros_like(mean), mean.clone()
    for share in shares.tried:
        open_ = whole - gain > shares.enough * whole if shares.enough else torch.ones_like(gain, dtype=torch.bool)
        where = open_[..., 0].nonzero(as_tuple=True)
        if not len(where[0]):
            break
        is_all = len(where[0]) == open_.numel()
        found = _fit(values if is_all else values[where], mean if is_all else mean[where], share)
        fits = [each.view(-1, 1) for each in found]
        better = fits[0] > gain[where]
        for kept, new in zip((gain, scale, offset), fits, strict=True):
            kept[where] = torch.where(better, new, kept[where])
    kept_scale, kept_offset = scale.half(), offset.half()
    return _nibbles(values, kept_scale.float(), kept_offset.float()).to(torch.uint8), kept_scale, kept_offset


def _fit(values: torch.Tensor, mean: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of groups [..., size] cut by a share: by how much the squares shrink, and the best scale and offset, [..., 1]."""
    low, high = values.aminmax(dim=-1, keepdim=True)
    reach = high - low
    integers = _nibbles(values, reach * (share / _LARGEST_NIBBLE), low + reach * max(0.0, (1 - share) / 2))
    average = integers.mean(dim=-1, keepdim=True)
    spread = (integers.square().mean(dim=-1, keepdim=True) - average.square()) * values.shape[-1]
    together = (integers * (values - mean)).sum(dim=-1, keepdim=True)
    scale = torch.where(spread > 0, together / spread, 0)
    return scale * together, scale, mean - scale * average


def _nibbles(values: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """The integers from 0 to 15 that scale * q + offset comes nearest to `values` with, as floats."""
    steps = torch.where(scale > 0, 1 / scale, 0)
    return ((values - offset) * steps).round_().clamp_(0, _LARGEST_NIBBLE)
