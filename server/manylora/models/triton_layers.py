"""Decoder layers in ten launches for the base: what stands between the products is one program each."""

from dataclasses import dataclass

import torch

from manylora.kernels.batch import Batch
from manylora.kernels.matmul import AddingMatmul
from manylora.kernels.triton_attention import TritonAttention
from manylora.kernels.triton_elementwise import add_norm, silu_and_mul, turn_and_write
from manylora.models.layers import Layer, LayerParts, Norm


@dataclass(frozen=True, slots=True)
class TritonStep:
    """A step's cos and sin [T, rotary_dim], contiguous."""

    cos: torch.Tensor
    sin: torch.Tensor
    batch: Batch


class TritonLayers:
    """`LayerKernel` of Triton programs around torch's matmuls."""

    def __init__(self, attention: TritonAttention) -> None:
        self._attention = attention

    def begin(self, cos: torch.Tensor, sin: torch.Tensor, batch: Batch) -> TritonStep:
        return TritonStep(cos.contiguous(), sin.contiguous(), batch)

    def layer(self, parts: LayerParts, keys: torch.Tensor, values: torch.Tensor) -> Layer[TritonStep] | None:
        if not isinstance(parts.down.matmul, AddingMatmul) or keys.shape[3] != values.shape[3]:
            return None

        def forward_(residual: torch.Tensor, step: TritonStep) -> None:
            normed = _norm(residual, None, parts.input_norm, step.batch)
            q = turn_and_write(parts.qkv(normed), step.cos, step.sin, keys, values, step.batch.kv_slots)
            attended = self._attention.attend(q, keys, values, step.batch, parts.options)
            normed = _norm(residual, parts.o(attended.flatten(1)), parts.mlp_norm, step.batch)
            parts.down.add_to_(residual, silu_and_mul(parts.gate_up(normed)))

        return forward_


def _norm(residual: torch.Tensor, added: torch.Tensor | None, norm: Norm, batch: Batch) -> torch.Tensor:
    out = add_norm(residual, added, norm.weight, norm.eps)
    if batch.lora is not None and batch.lora.rows.changes_output(norm.group.first):
        batch.lora.change_output_(out, norm.group)
    return out
