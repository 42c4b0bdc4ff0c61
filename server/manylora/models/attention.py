"""Attention over the paged cache, put into Hugging Face models through their attention interface.

A model whose configuration names our implementation gets no mask built, and calls us once per layer with the
queries, keys and values of the whole ragged batch. We store keys and values in their blocks and attend each
sequence to its own past, causally, within the layer's sliding window where it has one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import AttentionInterface

from manylora.errors import ModelUnusable
from manylora.kernels.batch import AttentionOptions, ForwardContext
from manylora.kernels.interface import Attention
from manylora.models.kv_cache import KVCache

AttentionFunction = Callable[..., tuple[torch.Tensor, None]]
# Options of Hugging Face's attention calls that change nothing here; any other that is set is refused.
_HARMLESS = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "deterministic",
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
    "position_bias": "a position bias",
    "indices": "sparse attention (indices)",
    "topk_indices": "sparse attention (topk_indices)",
}


def register(name: str, function: AttentionFunction) -> None:
    """Make an attention implementation known to transformers under `name`."""
    AttentionInterface.register(name, function)


def read_options(module: torch.nn.Module, head_dim: int, kwargs: dict[str, Any]) -> AttentionOptions:
    """Take what a layer passes. Raises ModelUnusable for an option that would change the result and is unknown."""
    scale = kwargs.pop("scaling", None)
    window = kwargs.pop("sliding_window", None)
    softcap = kwargs.pop("softcap", None)
    sinks, slopes = kwargs.pop("s_aux", None), kwargs.pop("slopes", None)
    unknown = [k for k, v in kwargs.items() if k not in _HARMLESS and v is not None]
    if unknown:
        named = ", ".join(_NAMES.get(each, each) for each in unknown)
        raise ModelUnusable(f"The model's attention ({type(module).__name__}) has {named}: not supported.")
    return AttentionOptions(
        float(scale if scale is not None else head_dim**-0.5),
        int(window or 0),
        float(softcap or 0),
        sinks=None if sinks is None else sinks.detach().float().contiguous(),
        slopes=None if slopes is None else slopes.detach().float().contiguous(),
    )


def paged_attention_function(
    cache: KVCache,
    context: ForwardContext,
    layers: Sequence[AttentionOptions],
    places: Mapping[int, int],
    attention: Attention,
) -> AttentionFunction:
    """The function that transformers calls: q [1, H, T, D], k [1, KVH, T, D], v [1, KVH, T, E] -> [1, T, H, E].

    `layers`: the options of each that attends, as the survey found them; what a call says of them is not read again.
    `places`: the place there, and in the cache, of each, by transformers' index.
    """

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **_kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        layer = places[int(module.layer_idx)]  # type: ignore[arg-type]
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
        out = attention(q, k, v, cache.keys[layer], cache.values[layer], context.current(), layers[layer])
        return out.unsqueeze(0), None

    return attend
