"""Attention of models that are older than transformers' interface for it: their own parts, around whoever attends.

Each function stands for the `forward` of one class of attention in evaluation: it makes queries, keys and values by the
module's own linears, asks the function that it is given, and ends as the module ends. What the model
gives as a mask is plainly causal in all of them, so it is left out. The start's comparison of logits is their proof.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as build_bloom_alibi
from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from manylora.models.attention import AttentionFunction

__all__ = ["adapt", "adapted", "is_older"]

# q [B, T, H, D], k and v [B, T, KVH, D], then options by name -> [B, T, H * D].
_Attend = Callable[..., torch.Tensor]
_Forward = Callable[..., tuple[torch.Tensor, None]]


def is_older(model: PreTrainedModel) -> bool:
    """Whether the model has attention of one of the classes below."""
    return any(type(module).__name__ in _FORWARDS for module in model.modules())


def adapt(model: PreTrainedModel, function: AttentionFunction) -> None:
    """Let modules of older attention attend by a function as transformers' interface has it, for good."""
    for module in model.modules():
        make = _FORWARDS.get(type(module).__name__)
        if make is not None:
            module.layer_idx = getattr(module, "layer_idx", getattr(module, "layer_id", None))
            module.forward = make(module, partial(_attend, function, module))


@contextmanager
def adapted(model: PreTrainedModel, function: AttentionFunction) -> Iterator[None]:
    """Let modules of older attention attend by a function while the context lasts."""
    adapt(model, function)
    try:
        yield
    finally:
        for module in model.modules():
            if type(module).__name__ in _FORWARDS:
                del module.forward


def _attend(
    function: AttentionFunction,
    module: nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    slopes: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    given = None if slopes is None else slopes.to(q.device)
    out, _ = function(module, *(each.transpose(1, 2) for each in (q, k, v)), None, slopes=given, **options)
    flat: torch.Tensor = out.flatten(2)
    return flat


def _bloom(module: Any, attend: _Attend) -> _Forward:
    ones = torch.ones(1, 2)
    slopes = build_bloom_alibi(ones, module.num_heads, torch.float32)[:, 0, 1]  # what the second position adds

    def forward(hidden_states: torch.Tensor, residual: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        heads = module.query_key_value(hidden_states).unflatten(2, (module.num_heads, 3, module.head_dim))
        out = attend(*heads.unbind(3), scaling=module.inv_norm_factor, slopes=slopes)
        return module.dense(out) + residual, None

    return forward


def _mpt(module: Any, attend: _Attend) -> _Forward:
    alibi = build_mpt_alibi_tensor(module.n_heads, 2)
    slopes = (alibi[:, 0, 1] - alibi[:, 0, 0]).float()

    def forward(
        hidden_states: torch.Tensor, position_bias: torch.Tensor | None = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        qkv = module.Wqkv(hidden_states)
        if module.clip_qkv:
            qkv = qkv.clamp(min=-module.clip_qkv, max=module.clip_qkv)
        parts = [part.unflatten(2, (module.n_heads, module.head_dim)) for part in qkv.chunk(3, dim=2)]
        given = None if position_bias is None else slopes
        return module.out_proj(attend(*parts, scaling=module.softmax_scale, slopes=given)), None

    return forward


def _falcon(module: Any, attend: _Attend) -> _Forward:
    ones = torch.ones(1, 2)
    slopes = build_bloom_alibi(ones, module.num_heads, torch.float32)[:, 0, 1] * module.inv_norm_factor

    def forward(
        hidden_states: torch.Tensor,
        alibi: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        fused = module.query_key_value(hidden_states)
        if module.new_decoder_architecture:
            groups = fused.unflatten(2, (module.num_kv_heads, -1, module.head_dim))
            q, k, v = groups[:, :, :, :-2].flatten(2, 3), groups[:, :, :, -2], groups[:, :, :, -1]
        else:
            q, k, v = module._split_heads(fused)
        if alibi is None and position_embeddings is not None:
            turned = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
            q, k = (each.transpose(1, 2) for each in turned)
        out = attend(q, k, v, scaling=1 / math.sqrt(module.head_dim), slopes=None if alibi is None else slopes)
        return module.dense(out), None

    return forward


def _gpt_neo(module: Any, attend: _Attend) -> _Forward:
    window = module.config.window_size if module.attention_type == "local" else None

    def forward(hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        parts = [
            linear(hidden_states).unflatten(2, (module.num_heads, module.head_dim))
            for linear in (module.q_proj, module.k_proj, module.v_proj)
        ]
        return module.out_proj(attend(*parts, scaling=1.0, sliding_window=window)), None

    return forward


_FORWARDS: Final[dict[str, Callable[[Any, _Attend], _Forward]]] = {
    "BloomAttention": _bloom,
    "FalconAttention": _falcon,
    "GPTNeoSelfAttention": _gpt_neo,
    "MptAttention": _mpt,
}
