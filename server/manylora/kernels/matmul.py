"""The base's matmul: one class for each form that a linear's weight is kept in. Which form, a backend says."""

from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

import torch
from torch.nn import functional

from manylora.kernels import native
from manylora.kernels.cpu import cpu_multiplies
from manylora.kernels.weights import (
    PANEL_WIDTH,
    Int4Weight,
    Int8Weight,
    PanelWeight,
    pack_int4,
    pack_int8,
    pack_panels,
)

__all__ = [
    "AddingMatmul",
    "BaseMatmul",
    "MatmulFactory",
    "NativeMatmul",
    "ReadableMatmul",
    "can_pack",
    "dense",
    "int4",
    "int8",
    "packed",
    "paneled",
    "unpacked_int4",
    "unpacked_int8",
    "widened",
]

# Rows for which oneDNN chooses the packed weight's order: that of a busy decode step. Others run well on it too.
_PACKED_FOR_ROWS = 32
# Of a rounded weight that is read back, in float32: on the way it takes five times that, which stays near the caches.
_READ_BACK_BYTES: Final = 2 << 20


class BaseMatmul(Protocol):
    """[T, in_features] -> a new [T, out_features]."""

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor: ...


@runtime_checkable
class ReadableMatmul(BaseMatmul, Protocol):
    """One whose weight can be read back."""

    def rows(self, begin: int, end: int, in_features: int) -> torch.Tensor:
        """The weight that it multiplies by, of the outputs from `begin` to `end`: [end - begin, in_features]."""
        ...


@runtime_checkable
class AddingMatmul(BaseMatmul, Protocol):
    """One that adds its product to what is there."""

    def add_to_(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """out [T, out_features] += the product of x [T, in_features], rounded once."""
        ...


@runtime_checkable
class NativeMatmul(BaseMatmul, Protocol):
    """One that the C++ layers compute as well."""

    def handle(self) -> Any:
        """Weight and bias as a `Weight` of csrc/weights.h."""
        ...


class MatmulFactory(Protocol):
    """Makes the matmul of `weight` [out, in] and `bias` [out]; `weight` may be thrown away afterwards."""

    def __call__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> BaseMatmul: ...


@dataclass(frozen=True, slots=True)
class Dense:
    """The plain product x W^T + b."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)

    def add_to_(self, out: torch.Tensor, x: torch.Tensor) -> None:
        if self.bias is None:
            out.addmm_(x, self.weight.T)
        else:
            out += self(x)

    def rows(self, begin: int, end: int, _in_features: int) -> torch.Tensor:
        return self.weight[begin:end]


def dense(weight: torch.Tensor, bias: torch.Tensor | None) -> BaseMatmul:
    """Torch's own product with the weight as it is."""
    return Dense(weight, bias)


@dataclass(frozen=True, slots=True)
class Packed:
    """The product with the weight in oneDNN's own order."""

    ordered: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.ordered, self.bias, "none", [], "")
        return out

    def rows(self, begin: int, end: int, _in_features: int) -> torch.Tensor:
        return self.ordered.to_dense()[begin:end]

    def handle(self) -> Any:
        return torch.classes.manylora.Weight.onednn(self.ordered, self.bias)


def packed(weight: torch.Tensor, bias: torch.Tensor | None) -> Packed:
    """Bring the weight into oneDNN's order once, instead of in every call. The packed weight is a copy.

    On the CPU, for thirty-two rows: faster by a quarter in bfloat16 (for one row twice as fast), by a tenth to two
    fifths in float32.
    """
    return Packed(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR_ROWS), bias)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether `packed` works here: oneDNN has kernels of `dtype` for this CPU and torch offers them."""
    return (
        bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and cpu_multiplies(dtype)
    )


def widened(weight: torch.Tensor, bias: torch.Tensor | None) -> BaseMatmul:
    """`packed` in float32 for 16-bit inputs; the result is rounded once, and the weight takes twice its room.

    For CPUs without 16-bit instructions, where torch's own 16-bit matmul takes four times as long.
    """
    return Widened(packed(weight.float(), _float(bias)))


@dataclass(frozen=True, slots=True)
class Widened:
    """A product in float32 of inputs of another type, which its result is rounded to."""

    matmul: Packed

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        return self.matmul(x.float()).to(x.dtype)

    def rows(self, begin: int, end: int, in_features: int) -> torch.Tensor:
        return self.matmul.rows(begin, end, in_features)


@dataclass(frozen=True, slots=True)
class Paneled:
    """The product by our own kernel, which reads the weight in the order in which it lies; see `native.linear`."""

    weight: PanelWeight
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        return native.linear(x, self.weight, self.bias)

    def rows(self, begin: int, end: int, in_features: int) -> torch.Tensor:
        return self.weight.rows(begin, end, in_features)

    def handle(self) -> Any:
        return torch.classes.manylora.Weight.panels(self.weight.packed, self.weight.out_features, self.bias)


def paneled(weight: torch.Tensor, bias: torch.Tensor | None) -> Paneled:
    """Copy the weight into panels."""
    return Paneled(pack_panels(weight), _float(bias))


@dataclass(frozen=True, slots=True)
class Rounded:
    """The product with the weight and, on the way, the inputs rounded to 8 bits; see `native.int8_linear`."""

    weight: Int8Weight
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        return native.int8_linear(x, self.weight, self.bias)

    def rows(self, begin: int, end: int, _in_features: int) -> torch.Tensor:
        return self.weight.rows(begin, end)

    def handle(self) -> Any:
        weight = self.weight
        return torch.classes.manylora.Weight.int8(
            weight.packed, weight.scales, weight.group_sums, weight.group_size, self.bias
        )


def int8(weight: torch.Tensor, bias: torch.Tensor | None) -> Rounded:
    """Quantise the weight."""
    return Rounded(pack_int8(weight), _float(bias))


@dataclass(frozen=True, slots=True)
class RoundedToNibbles:
    """The product with the weight rounded to 4 bits and, on the way, the inputs to 8; see `native.int4_linear`."""

    weight: Int4Weight
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        return native.int4_linear(x, self.weight, self.bias)

    def rows(self, begin: int, end: int, _in_features: int) -> torch.Tensor:
        return self.weight.rows(begin, end)

    def handle(self) -> Any:
        weight = self.weight
        return torch.classes.manylora.Weight.int4(
            weight.packed, weight.scales, weight.out_features, weight.group_size, self.bias
        )


def int4(weight: torch.Tensor, bias: torch.Tensor | None) -> RoundedToNibbles:
    """Quantise the weight."""
    return RoundedToNibbles(pack_int4(weight), _float(bias))


@dataclass(frozen=True, slots=True)
class Unpacked:
    """Torch's product with a weight that is kept rounded; inputs stay as they are.

    Every call reads the weight back, some panels of outputs at a time, so that it never stands whole in the memory.
    """

    weight: Int4Weight | Int8Weight
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        weight = self.weight
        panels = max(1, _READ_BACK_BYTES // (4 * PANEL_WIDTH * weight.in_features))
        out = x.new_empty((*x.shape[:-1], weight.out_features))
        for begin in range(0, weight.out_features, panels * PANEL_WIDTH):
            end = min(begin + panels * PANEL_WIDTH, weight.out_features)
            bias = None if self.bias is None else self.bias[begin:end]
            out[..., begin:end] = functional.linear(x, weight.rows(begin, end).to(x.dtype), bias)
        return out

    def rows(self, begin: int, end: int, _in_features: int) -> torch.Tensor:
        return self.weight.rows(begin, end)


def unpacked_int4(weight: torch.Tensor, bias: torch.Tensor | None) -> Unpacked:
    """Quantise the weight to 4 bits."""
    return Unpacked(pack_int4(weight), bias)


def unpacked_int8(weight: torch.Tensor, bias: torch.Tensor | None) -> Unpacked:
    """Quantise the weight to 8 bits."""
    return Unpacked(pack_int8(weight), bias)


def _float(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.float()
