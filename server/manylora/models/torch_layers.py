"""What a fused decoder layer is made of besides its linears, in C++ and in torch operations."""

from typing import Protocol

import torch
from torch.nn import functional

from manylora.models import native
from manylora.models.attention import AttentionOptions, StepViews, attend_paged, write_kv
from manylora.models.batch import Batch


class LayerOperators(Protocol):
    """The operators of `native`, over the fused linears' own outputs.

    Semantics, shapes and dtypes are those of `native`; `qkv` is [T, heads + 2 * kv_heads, head_dim].
    """

    def rotary(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A step's cos and sin [T, rotary_dim] of the model's dtype, in the form that `attend` takes."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor: ...

    def add_rms_norm_(
        self, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor: ...

    def attend(
        self,
        qkv: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
        values: torch.Tensor,
        batch: Batch,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """`rope_write_kv`, then `paged_attention`: [T, heads, head_dim]."""
        ...

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor: ...


class NativeOperators:
    """In C++."""

    def rotary(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return cos.float(), sin.float()

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return native.rms_norm(x, weight, eps)

    def add_rms_norm_(self, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return native.add_rms_norm_(residual, x, weight, eps)

    def attend(
        self,
        qkv: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
        values: torch.Tensor,
        batch: Batch,
        options: AttentionOptions,
    ) -> torch.Tensor:
        num_kv = keys.shape[1]
        q, k, v = torch.split(qkv, [qkv.shape[1] - 2 * num_kv, num_kv, num_kv], dim=1)
        q = native.rope_write_kv(q, k, v, *rotary, keys, values, batch.kv_slots)
        out = torch.empty_like(q)
        native.paged_attention(
            out, q, keys, values, batch.block_tables, batch.query_starts, batch.context_lens,
            options.scale, options.window, options.softcap,
        )  # fmt: skip
        return out

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return native.silu_and_mul(gate_up)


class TorchOperators:
    """In torch operations, with the model's dtype between them."""

    def __init__(self) -> None:
        self._views = StepViews()

    def rotary(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sine's first half is negated, so that a turn is two products and a sum."""
        half = sin.shape[1] // 2
        return cos[:, None], torch.cat((-sin[:, :half], sin[:, half:]), dim=1)[:, None]

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return functional.rms_norm(x, (x.shape[1],), weight, eps)

    def add_rms_norm_(self, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        residual += x
        return self.rms_norm(residual, weight, eps)

    def attend(
        self,
        qkv: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
        values: torch.Tensor,
        batch: Batch,
        options: AttentionOptions,
    ) -> torch.Tensor:
        cos, sin = rotary
        size, num_turned = cos.shape[2], qkv.shape[1] - keys.shape[1]
        straight = qkv[:, :num_turned]  # q and k
        x = straight[..., :size]
        turned = torch.addcmul(x * cos, x.roll(size // 2, dims=2), sin)
        if size < qkv.shape[2]:
            turned = torch.cat((turned, straight[..., size:]), dim=2)
        num_heads = num_turned - keys.shape[1]
        q, k, v = turned[:, :num_heads], turned[:, num_heads:], qkv[:, num_turned:]
        write_kv(k, v, keys, values, batch, self._views)
        return attend_paged(q, k, v, keys, values, batch, options, self._views)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=1)
        return functional.silu(gate).mul_(up)
