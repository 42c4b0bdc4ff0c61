"""Paged attention in C++."""

import torch

from manylora.kernels import native
from manylora.kernels.batch import AttentionOptions, Batch
from manylora.kernels.kv_entries import width_of


class NativeAttention:
    """`Attention` of the C++ extension, which has to be available. Keeps nothing between layers."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        batch: Batch,
        options: AttentionOptions,
    ) -> torch.Tensor:
        native.write_kv(k, v, keys, values, batch.kv_slots)
        out = torch.empty((*q.shape[:2], width_of(values)), dtype=q.dtype, device=q.device)
        native.paged_attention(
            out, q, keys, values, batch.block_tables, batch.query_starts, batch.context_lens,
            options.scale, options.window, options.softcap, options.chunk, options.sinks, options.slopes,
        )  # fmt: skip
        return out
