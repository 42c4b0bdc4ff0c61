"""Attention over the paged cache, put into Hugging Face models through their attention interface.

A model whose configuration names our implementation gets no mask built, and calls us once per layer with the
queries, keys and values of the whole ragged batch. We store keys and values in their blocks and attend each
sequence to its own past, causally, within the layer's sliding window where it has one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

from manylora.errors import ModelUnusable
from manylora.models import native
from manylora.models.batch import Batch, ForwardContext
from manylora.models.kv_cache import KVCache

AttentionFunction = Callable[..., tuple[torch.Tensor, None]]
# Options of Hugging Face's attention calls that change nothing here; any other that is set is refused.
_HARMLESS = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "dropout",
        "is_causal",
        "layer_past",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What may differ per layer: softmax scale, window in positions (0: none), logit soft cap (0: none)."""

    scale: float
    window: int
    softcap: float


def register(name: str, function: AttentionFunction) -> None:
    """Make an attention implementation known to transformers under `name`."""
    AttentionInterface.register(name, function)


def read_options(module: torch.nn.Module, head_dim: int, kwargs: dict[str, Any]) -> AttentionOptions:
    """Take what a layer passes. Raises ModelUnusable for an option that would change the result and is unknown."""
    scale = kwargs.pop("scaling", None)
    window = kwargs.pop("sliding_window", None)
    softcap = kwargs.pop("softcap", None)
    unknown = [k for k, v in kwargs.items() if k not in _HARMLESS and v is not None]
    if unknown:
        raise ModelUnusable(
            f"The model's attention ({type(module).__name__}) needs {', '.join(unknown)}: not supported."
        )
    return AttentionOptions(
        float(scale if scale is not None else head_dim**-0.5), int(window or 0), float(softcap or 0)
    )


def paged_attention_function(cache: KVCache, context: ForwardContext, *, use_native: bool) -> AttentionFunction:
    """The function that transformers calls: q [1, H, T, D], k and v [1, KVH, T, D] -> [1, T, H, D]."""

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        options = read_options(module, query.shape[-1], kwargs)
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        batch = context.current()
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
        keys, values = cache.keys[layer], cache.values[layer]
        if use_native:
            native.write_kv(k, v, keys, values, batch.kv_slots)
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            native.paged_attention(
                out, q, keys, values, batch.block_tables, batch.query_starts, batch.context_lens,
                options.scale, options.window, options.softcap,
            )  # fmt: skip
        else:
            write_kv(k, v, keys, values, batch.kv_slots)
            out = attend_paged(q, keys, values, batch, options)
        return out.unsqueeze(0), None

    return attend


def write_kv(k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
    """Store k, v [T, KVH, D] at `slots` [T] of the cache."""
    size = keys.shape[2]
    block, offset = slots // size, slots % size
    keys[block, :, offset] = k
    values[block, :, offset] = v


def attend_paged(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, options: AttentionOptions
) -> torch.Tensor:
    """Attention in torch operations: q [T, H, D] -> [T, H, D].

    The sequences with one query each are one padded batch; a prompt's chunk is done on its own.
    """
    out = torch.empty_like(q)
    n = batch.num_decode
    if n:
        longest = max(batch.lens[:n])
        used = -(-longest // keys.shape[2])
        out[:n] = _decode(q[:n], keys, values, batch.block_tables[:n, :used].long(), batch.context_lens[:n], options)
    for s in range(n, len(batch.lens)):
        start, end, length = batch.starts[s], batch.starts[s + 1], batch.lens[s]
        table = batch.block_tables[s, : -(-length // keys.shape[2])].long()
        out[start:end] = prefill(
            q[start:end], _flat(keys, table)[:, :length], _flat(values, table)[:, :length], options
        )
    return out


def _flat(cache: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """One sequence's blocks as [KVH, positions, D]."""
    return cache[table].transpose(0, 1).flatten(1, 2)


def _softmax(scores: torch.Tensor, allowed: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    scores = scores.float() * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    return torch.softmax(scores.masked_fill(~allowed, float("-inf")), dim=-1)


def _decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    lens: torch.Tensor,
    options: AttentionOptions,
) -> torch.Tensor:
    n, heads, dim = q.shape
    num_kv = keys.shape[1]
    # Small matmuls in 16 bits are slow on CPUs; there keys and values are widened once they are gathered.
    wide = torch.float32 if q.device.type == "cpu" else q.dtype
    entries = (tables[:, None] * num_kv + torch.arange(num_kv, device=q.device)[:, None]).flatten()

    def gather(cache: torch.Tensor) -> torch.Tensor:
        """[n, KVH, L, D], a copy."""
        return cache.flatten(2).flatten(0, 1).index_select(0, entries).view(n, num_kv, -1, dim).to(wide)

    k, v = gather(keys), gather(values)
    position = torch.arange(k.shape[2], device=q.device)
    allowed = position < lens[:, None]
    if options.window:
        allowed &= position >= lens[:, None] - options.window
    grouped = q.reshape(n, num_kv, -1, dim).to(wide)
    weights = _softmax(grouped @ k.transpose(2, 3), allowed[:, None, None], options)
    # Behind a sequence's end the blocks hold what others left there, and 0 * NaN is NaN. Indices, as a mask would make
    # torch go over all of v.
    unseen = (~allowed).nonzero(as_tuple=True)
    v.transpose(1, 2)[unseen] = 0
    return (weights.to(wide) @ v).reshape(n, heads, dim).to(q.dtype)


def prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    """q [n, H, D] at the end of k, v [KVH, L, D]."""
    n, heads, dim = q.shape
    num_kv, length, _ = k.shape
    at = torch.arange(length - n, length, device=q.device)[:, None]
    position = torch.arange(length, device=q.device)
    allowed = position <= at
    if options.window:
        allowed &= position > at - options.window
    if not options.softcap:
        wide_k, wide_v = (t.repeat_interleave(heads // num_kv, dim=0)[None] for t in (k, v))
        out = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None], wide_k, wide_v, attn_mask=allowed, scale=options.scale
        )
        return out[0].transpose(0, 1)
    grouped = q.transpose(0, 1).reshape(num_kv, -1, dim)  # rows: head within the group, then query
    weights = _softmax((grouped @ k.transpose(1, 2)).view(num_kv, -1, n, length), allowed, options)
    out = (weights.to(v.dtype).flatten(1, 2) @ v).view(heads, n, dim)
    return out.transpose(0, 1)
