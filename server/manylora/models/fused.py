"""A decoder layer in one call instead of sixty, for the models whose layers have the usual shape.

Most decoders are made of the same parts: norm, q/k/v, rotary embedding, attention, o, norm, gate/up, down. Such
a layer is recognised by its parts, not by its class, and computed whole (`layers.py`). Nothing is taken on trust: at
start each such layer is compared with the one whose place it would take, and one that differs (a residual scaled,
queries that grow with the position, no rotary embedding) does not take it.
"""

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from transformers.activations import SiLUActivation

from manylora.kernels.batch import ForwardContext
from manylora.models.kv_cache import KVCache
from manylora.models.layers import Layer, LayerKernel, LayerParts, Norm
from manylora.models.linear import AdaptedLinear, AdaptedNorm, FusedMember
from manylora.models.wrapping import WrappedModel

S = TypeVar("S")
_LAYER_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj"}
_SILU = (nn.SiLU, SiLUActivation)


class _Steps(Generic[S]):
    """What the layers of a step share, made by the first of them."""

    def __init__(self, kernel: LayerKernel[S], context: ForwardContext) -> None:
        self._kernel = kernel
        self._context = context
        self._current: tuple[torch.Tensor, S] | None = None

    def of(self, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> S:
        """By cos and sin [1, T, rotary_dim], of which every layer of a step is given the same."""
        cos, sin = position_embeddings
        if self._current is None or self._current[0] is not cos:
            self._current = cos, self._kernel.begin(cos[0], sin[0], self._context.current())
        return self._current[1]


class FusedDecoderLayer(nn.Module, Generic[S]):
    """Stands where a decoder layer stood; [1, T, hidden] -> [1, T, hidden], in place."""

    def __init__(self, layer: Layer[S], steps: _Steps[S]) -> None:
        super().__init__()
        self._layer = layer
        self._steps = steps

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **kwargs: Any,
    ) -> torch.Tensor:
        self._layer(hidden_states.view(-1, hidden_states.shape[-1]), self._steps.of(position_embeddings))
        return hidden_states


def candidates(wrapped: WrappedModel, cache: KVCache) -> dict[str, nn.Module]:
    """A fused layer for each of the usual shape that the backend can run, by its path. None is in the model yet."""
    kernel = wrapped.backend.layers
    steps = _Steps(kernel, wrapped.context)
    found: dict[str, nn.Module] = {}
    for path, module in wrapped.model.named_modules():
        if {name for name, _ in module.named_children()} == _LAYER_PARTS:
            parts = _recognise(module, wrapped)
            if parts is not None:
                index = _place(module.get_submodule("self_attn"), wrapped)
                layer = kernel.layer(parts, cache.keys[index], cache.values[index])
                if layer is not None:
                    found[path] = FusedDecoderLayer(layer, steps)
    return found


def exchange(wrapped: WrappedModel, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Put layers into the model. Returns those that were there, by path."""
    before = {path: wrapped.model.get_submodule(path) for path in layers}
    for path, module in layers.items():
        wrapped.model.set_submodule(path, module)
    return before


def _recognise(layer: nn.Module, wrapped: WrappedModel) -> LayerParts | None:
    attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    own, inner = dict(attention.named_children()), dict(mlp.named_children())
    activation = inner.pop("act_fn", None)
    if own.keys() != _ATTENTION_PARTS or inner.keys() != _MLP_PARTS or not isinstance(activation, _SILU):
        return None
    qkv = _group(own["q_proj"], own["k_proj"], own["v_proj"])
    gate_up = _group(inner["gate_proj"], inner["up_proj"])
    input_norm = _norm(layer.get_submodule("input_layernorm"))
    mlp_norm = _norm(layer.get_submodule("post_attention_layernorm"))
    o, down = own["o_proj"], inner["down_proj"]
    if qkv is None or gate_up is None or input_norm is None or mlp_norm is None:
        return None
    if not isinstance(o, AdaptedLinear) or not isinstance(down, AdaptedLinear):
        return None
    options = wrapped.survey.options[_place(attention, wrapped)]
    if options.chunk or options.sinks is not None or options.slopes is not None:
        return None
    return LayerParts(
        input_norm=input_norm,
        qkv=qkv,
        o=o,
        mlp_norm=mlp_norm,
        gate_up=gate_up,
        down=down,
        options=options,
    )


def _place(attention: nn.Module, wrapped: WrappedModel) -> int:
    """The layer's place in the cache."""
    index = getattr(attention, "layer_idx", None)
    assert isinstance(index, int)
    return wrapped.survey.places[index]


def _group(*members: nn.Module) -> AdaptedLinear | None:
    """The one matmul behind `members`, if that is what they are, in this order and no others beside them."""
    shared = {id(m.fused): m.fused for m in members if isinstance(m, FusedMember)}
    if len(shared) != 1 or not all(isinstance(m, FusedMember) and m.member == i for i, m in enumerate(members)):
        return None
    fused = next(iter(shared.values()))
    return fused.linear if len(fused.widths) == len(members) else None


def _norm(module: nn.Module) -> Norm | None:
    if not isinstance(module, AdaptedNorm) or not type(module.base).__name__.endswith("RMSNorm"):
        return None
    eps = getattr(module.base, "variance_epsilon", None)
    weight = module.base.weight
    if eps is None or not isinstance(weight, torch.Tensor):
        return None
    return Norm(weight.detach(), float(eps), module.group)
