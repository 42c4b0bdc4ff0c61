"""What a decoder layer of the usual shape is made of, and who computes it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from manylora.kernels.batch import AttentionOptions, Batch
from manylora.kernels.interface import SiteGroup
from manylora.models.linear import AdaptedLinear

S = TypeVar("S")
# Runs one layer in place on the residual stream [T, hidden], in a step.
Layer = Callable[[torch.Tensor, S], None]


@dataclass(frozen=True, slots=True)
class Norm:
    """Root mean square norm: weight * x / rms(x), whose output adapters may change at the one site of `group`."""

    weight: torch.Tensor
    eps: float
    group: SiteGroup


@dataclass(frozen=True, slots=True)
class LayerParts:
    """What one layer is made of. `qkv` and `gate_up` are the fused linears."""

    input_norm: Norm
    qkv: AdaptedLinear
    o: AdaptedLinear
    mlp_norm: Norm
    gate_up: AdaptedLinear
    down: AdaptedLinear
    options: AttentionOptions


class LayerKernel(Protocol[S]):
    """Computes layers, all of a step with the same `S`.

    x = residual; a = o(attention(rope(qkv(norm(x))))); x += a; residual = x + down(silu(gate) * up)
    with gate, up = gate_up(norm(x)), and every linear with its low-rank deltas
    """

    def begin(self, cos: torch.Tensor, sin: torch.Tensor, batch: Batch) -> S:
        """What a step's layers share. cos and sin [T, rotary_dim], of the model's dtype."""
        ...

    def layer(self, parts: LayerParts, keys: torch.Tensor, values: torch.Tensor) -> Layer[S] | None:
        """One layer with its own cache [blocks, kv_heads, block_size, head_dim]; None for parts that it cannot run."""
        ...
