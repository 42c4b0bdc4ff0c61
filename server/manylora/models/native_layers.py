"""Decoder layers in C++, a call each: for a few rows, going from Python to C++ and back costs as much as the work."""

from typing import Any

import torch

from manylora.kernels.batch import Batch
from manylora.kernels.matmul import NativeMatmul
from manylora.kernels.native_lora import NativePlan
from manylora.kernels.rows import MixedRows
from manylora.models.layers import Layer, LayerParts, Norm
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
            if rows.slots:
                touched = torch.tensor(rows.touched)
                step.set_lora(batch.lora.tables, rows.order, rows.segment_slots, rows.segment_starts, touched)
            if rows.changed is not None:
                inputs, outputs = torch.tensor(rows.changed.inputs), torch.tensor(rows.changed.outputs)
                step.set_changes(batch.lora.inputs, inputs, batch.lora.outputs, outputs)
            if rows.mixes is not None:
                _set_mixes(step, batch.lora, rows.mixes)
        return step

    def layer(self, parts: LayerParts, keys: torch.Tensor, values: torch.Tensor) -> Layer[Handle] | None:
        linears = [_linear(each) for each in (parts.qkv, parts.o, parts.gate_up, parts.down)]
        if any(each is None for each in linears):
            return None
        qkv, o, gate_up, down = linears
        options = parts.options
        layer = torch.classes.manylora.FusedDecoderLayer(
            _norm(parts.input_norm), qkv, o, _norm(parts.mlp_norm), gate_up, down,
            keys, values, options.scale, options.window, options.softcap,
        )  # fmt: skip
        forward_: Layer[Handle] = layer.forward_
        return forward_


def _set_mixes(step: Handle, plan: NativePlan, mixes: MixedRows) -> None:
    touched = torch.tensor(mixes.touched)
    changed = mixes.changed
    inputs, outputs = (
        (torch.zeros_like(touched), torch.zeros_like(touched))
        if changed is None
        else (torch.tensor(changed.inputs), torch.tensor(changed.outputs))
    )
    step.set_mixes(
        plan.tables, plan.inputs, plan.outputs, mixes.order, mixes.row_starts, mixes.part_starts, mixes.part_slots,
        mixes.part_weights, touched, inputs, outputs,
    )  # fmt: skip


def _linear(linear: AdaptedLinear) -> Handle | None:
    """None for a linear that computes in a way of its own."""
    matmul = linear.matmul
    if not isinstance(matmul, NativeMatmul):
        return None
    width = torch.tensor((0, linear.in_features), dtype=torch.int32)
    return torch.classes.manylora.AdaptedLinear(matmul.handle(), linear.group.first, width, linear.group.offsets_i32)


def _norm(norm: Norm) -> Handle:
    group = norm.group
    return torch.classes.manylora.AdaptedNorm(norm.weight, norm.eps, group.first, group.offsets_i32)
