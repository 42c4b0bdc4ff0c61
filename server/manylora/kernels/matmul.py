"""The base's matmul, in the form that is fastest for the dtype and the device."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch.nn import functional

from manylora.kernels import native
from manylora.kernels.cpu import cpu_multiplies
from manylora.kernels.int8 import Int8Weight, pack_int8
from manylora.kernels.weights import PanelWeight, pack_panels

__all__ = ["BaseMatmul", "MatmulFactory", "Quantization", "factory"]

Quantization = Literal["none", "int8"]

# Rows for which oneDNN chooses the packed weight's order: that of a busy decode step. Others run well on it too.
_PACKED_FOR_ROWS = 32


class BaseMatmul(Protocol):
    """[T, in_features] -> a new [T, out_features]."""

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor: ...


class MatmulFactory(Protocol):
    """Makes the matmul of `weight` [out, in] and `bias` [out]; `weight` may be thrown away afterwards."""

    def __call__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> BaseMatmul: ...


def factory(quantization: Quantization = "none", *, use_native: bool = False) -> MatmulFactory:
    """What to make every linear of a model with. int8 is for the C++ kernels only.

    On a CPU that is our own panels: torch's matmul brings a weight into another order in every call, which costs more
    than the product while the rows are few, and oneDNN's, which need not, reads bfloat16 at half the memory's rate.
    Where the CPU has a unit for bfloat16 matrices (AMX), which oneDNN uses and we do not, bfloat16 goes there. Without
    the C++ kernels everything goes there, 16-bit weights for which it has no kernels as float32.
    """
    if quantization == "int8":
        return int8

    def best(weight: torch.Tensor, bias: torch.Tensor | None) -> BaseMatmul:
        if use_native and not (weight.dtype is torch.bfloat16 and _has_matrix_unit() and can_pack(weight)):
            return paneled(weight, bias)
        if can_pack(weight):
            return packed(weight, bias)
        return widened(weight, bias) if can_pack(weight, torch.float32) else dense(weight, bias)

    return best


def dense(weight: torch.Tensor, bias: torch.Tensor | None) -> BaseMatmul:
    """The plain product x W^T + b."""

    def matmul(x: torch.Tensor, /) -> torch.Tensor:
        return functional.linear(x, weight, bias)

    return matmul


@dataclass(frozen=True, slots=True)
class Packed:
    """The same with the weight in oneDNN's own order."""

    ordered: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.ordered, self.bias, "none", [], "")
        return out


def packed(weight: torch.Tensor, bias: torch.Tensor | None) -> Packed:
    """Bring the weight into oneDNN's order once, instead of in every call. The packed weight is a copy.

    On the CPU, for thirty-two rows: faster by a quarter in bfloat16 (for one row twice as fast), by a tenth to two
    fifths in float32.
    """
    return Packed(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR_ROWS), bias)


def widened(weight: torch.Tensor, bias: torch.Tensor | None) -> BaseMatmul:
    """The same in float32 for 16-bit inputs; the result is rounded once, and the weight takes twice its room.

    For CPUs without 16-bit instructions, where torch's own 16-bit matmul takes four times as long.
    """
    matmul = packed(weight.float(), _float(bias))

    def widen(x: torch.Tensor, /) -> torch.Tensor:
        return matmul(x.float()).to(x.dtype)

    return widen


@dataclass(frozen=True, slots=True)
class Paneled:
    """The same by our own kernel, which reads the weight in the order in which it lies; see `native.linear`."""

    weight: PanelWeight
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        return native.linear(x, self.weight, self.bias)


def paneled(weight: torch.Tensor, bias: torch.Tensor | None) -> Paneled:
    """Copy the weight into panels."""
    return Paneled(pack_panels(weight), _float(bias))


@dataclass(frozen=True, slots=True)
class Int8:
    """The product with the weight and, on the way, the inputs rounded to 8 bits; see `native.int8_linear`."""

    weight: Int8Weight
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        return native.int8_linear(x, self.weight, self.bias)


def int8(weight: torch.Tensor, bias: torch.Tensor | None) -> Int8:
    """Quantise the weight."""
    return Int8(pack_int8(weight), _float(bias))


def _float(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.float()


def _has_matrix_unit() -> bool:
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def can_pack(weight: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether `packed` works here: oneDNN has kernels of `dtype` (the weight's) for this CPU and torch offers them."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.enabled:
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return cpu_multiplies(dtype or weight.dtype)
