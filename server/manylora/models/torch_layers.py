"""Decoder layers in torch operations, with the model's dtype between them."""

from dataclasses import dataclass

import torch
from torch.nn import functional

from manylora.kernels.batch import AttentionOptions, Batch
from manylora.kernels.interface import Attention
from manylora.kernels.kv_entries import width_of
from manylora.models.layers import Layer, LayerParts, Norm


@dataclass(frozen=True, slots=True)
class TorchStep:
    """A step's cos and sin [T, 1, rotary_dim]. The sine's first half is negated: a turn is two products and a sum."""

    cos: torch.Tensor
    sin: torch.Tensor
    batch: Batch


class TorchLayers:
    """`LayerKernel` of torch operations, around any attention."""

    def __init__(self, attention: Attention) -> None:
        self._attention = attention

    def begin(self, cos: torch.Tensor, sin: torch.Tensor, batch: Batch) -> TorchStep:
        half = sin.shape[1] // 2
        return TorchStep(cos[:, None], torch.cat((-sin[:, :half], sin[:, half:]), dim=1)[:, None], batch)

    def layer(self, parts: LayerParts, keys: torch.Tensor, values: torch.Tensor) -> Layer[TorchStep]:
        heads = (-1, width_of(keys))

        def forward_(residual: torch.Tensor, step: TorchStep) -> None:
            qkv = parts.qkv(rms_norm(residual, parts.input_norm, step.batch)).unflatten(1, heads)
            attended = self._attend(qkv, keys, values, step, parts.options).flatten(1)
            residual += parts.o(attended)
            gate, up = parts.gate_up(rms_norm(residual, parts.mlp_norm, step.batch)).chunk(2, dim=1)
            residual += parts.down(functional.silu(gate).mul_(up))

        return forward_

    def _attend(
        self, qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: TorchStep, options: AttentionOptions
    ) -> torch.Tensor:
        """qkv [T, heads + 2 * kv_heads, head_dim] -> [T, heads, head_dim]."""
        size, num_turned = step.cos.shape[2], qkv.shape[1] - keys.shape[1]
        straight = qkv[:, :num_turned]  # q and k
        x = straight[..., :size]
        turned = torch.addcmul(x * step.cos, x.roll(size // 2, dims=2), step.sin)
        if size < qkv.shape[2]:
            turned = torch.cat((turned, straight[..., size:]), dim=2)
        num_heads = num_turned - keys.shape[1]
        q, k, v = turned[:, :num_heads], turned[:, num_heads:], qkv[:, num_turned:]
        return self._attention(q, k, v, keys, values, step.batch, options)


def rms_norm(x: torch.Tensor, norm: Norm, batch: Batch) -> torch.Tensor:
    """[T, hidden] -> [T, hidden]."""
    out = functional.rms_norm(x, (x.shape[1],), norm.weight, norm.eps)
    if batch.lora is not None and batch.lora.rows.changes_output(norm.group.first):
        batch.lora.change_output_(out, norm.group)
    return out
