"""Decoder layers in C++, a call each: for a few rows, going from Python to C++ and back costs as much as the work."""

from typing import Any

import torch

from manylora.kernels.batch import Batch
from manylora.kernels.matmul import NativeMatmul
from manylora.kernels.native_lora import NativePlan
from manylora.models.layers import Layer, LayerParts
from manylora.models.linear import AdaptedLinear

# Handles of C++ objects (csrc/layer.cpp), which torch has no static types for.
Handle = Any


class NativeLayers:
    """`LayerKernel` of the C++ extension, which has to be available; each step is of `NativeKernel`'s plans."""

    def begin(self, cos: torch.Tensor, sin: torch.Tensor, batch: Batch) -> Handle:
        step = torch.classes.manylora.Step(
            cos.float(), sin.float(), batch.kv_slots, batch.block_tables, batch.query_starts, batch.context_lens
        )
        if batch.lora is not None:
            assert isinstance(batch.lora, NativePlan)
            rows = batch.lora.rows
            touched = torch.tensor(rows.touched)
            step.set_lora(batch.lora.tables, rows.order, rows.segment_slots, rows.segment_starts, touched)
        return step

    def layer(self, parts: LayerParts, keys: torch.Tensor, values: torch.Tensor) -> Layer[Handle] | None:
        linears = [_linear(each) for each in (parts.qkv, parts.o, parts.gate_up, parts.down)]
        if any(each is None for each in linears):
            return None
        qkv, o, gate_up, down = linears
        options = parts.options
        layer = torch.classes.manylora.FusedDecoderLayer(
            parts.input_norm.weight, parts.input_norm.eps, qkv, o,
            parts.mlp_norm.weight, parts.mlp_norm.eps, gate_up, down,
            keys, values, options.scale, options.window, options.softcap,
        )  # fmt: skip
        forward_: Layer[Handle] = layer.forward_
        return forward_


def _linear(linear: AdaptedLinear) -> Handle | None:
    """None for a linear that computes in a way of its own."""
    matmul = linear.matmul
    if not isinstance(matmul, NativeMatmul):
        return None
    return torch.classes.manylora.AdaptedLinear(matmul.handle(), linear.group.first, linear.group.offsets_i32)
