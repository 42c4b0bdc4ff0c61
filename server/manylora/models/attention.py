"""Attention over the paged cache, put into Hugging Face models through their attention interface.

A model whose configuration names our implementation gets no mask built, and calls us once per layer with the
queries, keys and values of the whole ragged batch. We store keys and values in their blocks and attend each
sequence to its own past, causally, within the layer's sliding window where it has one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

from manylora.errors import ModelUnusable
from manylora.kernels import native
from manylora.kernels.batch import Batch, ForwardContext
from manylora.kernels.cpu import cpu_multiplies
from manylora.models.kv_cache import KVCache
from manylora.models.masks import hidden_from

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
# What those that are refused are called.
_NAMES = {
    "s_aux": "attention sinks (s_aux)",
    "sinks": "attention sinks",
    "position_bias": "a position bias",
    "alibi": "a position bias (ALiBi)",
    "indices": "sparse attention (indices)",
    "topk_indices": "sparse attention (topk_indices)",
}


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
        named = ", ".join(_NAMES.get(each, each) for each in unknown)
        raise ModelUnusable(f"The model's attention ({type(module).__name__}) has {named}: not supported.")
    return AttentionOptions(
        float(scale if scale is not None else head_dim**-0.5), int(window or 0), float(softcap or 0)
    )


def paged_attention_function(
    cache: KVCache, context: ForwardContext, layers: Sequence[AttentionOptions], *, use_native: bool
) -> AttentionFunction:
    """The function that transformers calls: q [1, H, T, D], k and v [1, KVH, T, D] -> [1, T, H, D].

    `layers`: the options of each, as the survey found them; what a call says of them is not read again.
    """
    views = StepViews()

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **_kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        options = layers[layer]
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
            write_kv(k, v, keys, values, batch, views)
            out = attend_paged(q, k, v, keys, values, batch, options, views)
        return out.unsqueeze(0), None

    return attend


def write_kv(
    k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, views: "StepViews"
) -> None:
    """Store the step's k, v [T, KVH, D] in the cache."""
    rows = views.written(batch, keys.shape[1], keys.shape[2])
    for new, cache in ((k, keys), (v, values)):
        cache.view(-1, cache.shape[3]).index_copy_(0, rows, new.reshape(-1, cache.shape[3]))


@dataclass(frozen=True, slots=True)
class DecodeView:
    """Which of the cache's rows [blocks * KVH] the decoding sequences [n] look at.

    `entries` int64 [n * KVH * blocks of the longest]; `hidden` bool [n, 1, 1, L]: positions they may not see;
    `unseen` int64: the same as rows of [n * KVH * L].
    """

    entries: torch.Tensor
    hidden: torch.Tensor
    unseen: torch.Tensor


class StepViews:
    """Where a step reads and writes the cache, worked out once for all layers of the same shape."""

    def __init__(self) -> None:
        self._step: torch.Tensor | None = None
        self._decode: dict[tuple[int, int], DecodeView] = {}
        self._written: dict[int, torch.Tensor] = {}

    def decode(self, batch: Batch, num_kv: int, block_size: int, window: int) -> DecodeView:
        """What the decoding sequences look at, in layers with as many heads and the same window."""
        self._begin(batch)
        if (num_kv, window) not in self._decode:
            self._decode[num_kv, window] = _decode_view(batch, num_kv, block_size, window)
        return self._decode[num_kv, window]

    def written(self, batch: Batch, num_kv: int, block_size: int) -> torch.Tensor:
        """Where the new tokens' keys go: rows of the cache as [blocks * KVH * block size, D], int64 [T * KVH]."""
        self._begin(batch)
        if num_kv not in self._written:
            block, offset = batch.kv_slots // block_size, batch.kv_slots % block_size
            heads = torch.arange(num_kv, device=block.device)
            self._written[num_kv] = ((block[:, None] * num_kv + heads) * block_size + offset[:, None]).flatten()
        return self._written[num_kv]

    def _begin(self, batch: Batch) -> None:
        if self._step is not batch.context_lens:  # every step has its own
            self._step, self._decode, self._written = batch.context_lens, {}, {}


def _decode_view(batch: Batch, num_kv: int, block_size: int, window: int) -> DecodeView:
    n = batch.num_decode
    blocks = -(-max(batch.lens[:n]) // block_size)
    tables, lens = batch.block_tables[:n, :blocks].long(), batch.context_lens[:n, None]
    position = torch.arange(blocks * block_size, device=lens.device)
    hidden = position >= lens
    if window:
        hidden |= position < lens - window
    heads = torch.arange(num_kv, device=lens.device)[:, None]
    entries = tables[:, None] * num_kv + heads
    sequence, at = hidden.nonzero(as_tuple=True)
    unseen = (sequence * num_kv + heads) * position.numel() + at
    return DecodeView(entries.flatten(), hidden[:, None, None], unseen.flatten())


def attend_paged(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: Batch,
    options: AttentionOptions,
    views: StepViews,
) -> torch.Tensor:
    """Attention in torch operations: q [T, H, D] -> [T, H, D]; k, v [T, KVH, D] are the step's, in the cache already.

    The sequences with one query each are one padded batch; a prompt's chunk is done on its own.
    """
    out = torch.empty_like(q)
    n = batch.num_decode
    if n:
        view = views.decode(batch, keys.shape[1], keys.shape[2], options.window)
        out[:n] = _decode(q[:n], keys, values, view, options)
    for s in range(n, len(batch.lens)):
        rows, length = slice(batch.starts[s], batch.starts[s + 1]), batch.lens[s]
        if rows.stop - rows.start == length:  # the whole of it: nothing to be brought together from blocks
            past = k[rows].transpose(0, 1), v[rows].transpose(0, 1)
        else:
            table = batch.block_tables[s, : -(-length // keys.shape[2])].long()
            past = _flat(keys, table)[:, :length], _flat(values, table)[:, :length]
        out[rows] = prefill(q[rows], *past, options)
    return out


def _flat(cache: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """One sequence's blocks as [KVH, positions, D]."""
    return cache[table].transpose(0, 1).flatten(1, 2)


def _softmax(scores: torch.Tensor, hidden: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    scores = scores.float() * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    return torch.softmax(scores.masked_fill_(hidden, float("-inf")), dim=-1)


def _decode(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, view: DecodeView, options: AttentionOptions
) -> torch.Tensor:
    n, heads, dim = q.shape
    num_kv = keys.shape[1]
    # Small matmuls in 16 bits are slow on most CPUs; there keys and values are widened once they are gathered.
    is_direct = q.device.type != "cpu" or cpu_multiplies(q.dtype)
    wide = q.dtype if is_direct else torch.float32

    def gather(cache: torch.Tensor) -> torch.Tensor:
        """[n, KVH, L, D], a copy. Behind a sequence's end blocks hold what others left there, and 0 * NaN is NaN."""
        rows = cache.flatten(2).flatten(0, 1).index_select(0, view.entries).to(wide)
        return rows.view(-1, dim).index_fill_(0, view.unseen, 0).view(n, num_kv, -1, dim)

    k, v = gather(keys), gather(values)
    grouped = q.reshape(n, num_kv, -1, dim).to(wide)
    if is_direct and not options.softcap:
        out = functional.scaled_dot_product_attention(grouped, k, v, attn_mask=~view.hidden, scale=options.scale)
    else:
        out = _softmax(grouped @ k.transpose(2, 3), view.hidden, options).to(wide) @ v
    return out.reshape(n, heads, dim).to(q.dtype)


def prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    """q [n, H, D] at the end of k, v [KVH, L, D]."""
    n, heads, dim = q.shape
    num_kv, length, _ = k.shape
    if not options.softcap:
        causal = n == length and not options.window  # a whole prompt: torch skips what a mask would hide
        mask = None if causal else ~hidden_from(n, length, options.window, q.device)
        out = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k[None], v[None], mask, is_causal=causal, scale=options.scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)
    grouped = q.transpose(0, 1).reshape(num_kv, -1, dim)  # rows: head within the group, then query
    weights = _softmax(
        (grouped @ k.transpose(1, 2)).view(num_kv, -1, n, length),
        hidden_from(n, length, options.window, q.device),
        options,
    )
    out = (weights.to(v.dtype).flatten(1, 2) @ v).view(heads, n, dim)
    return out.transpose(0, 1)
