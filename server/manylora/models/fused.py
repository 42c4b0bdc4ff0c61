"""A decoder layer in ten operations instead of sixty, for the models whose layers have the usual shape.

Most decoders are made of the same parts: norm, q/k/v, rotary embedding, attention, o, norm, gate/up, down. Such
a layer is recognised by its parts, not by its class, and run through the operators of `operators.py`. Nothing is taken
on trust: the self-check compares the whole model with the untouched one, and a model that differs (a residual
scaled, an activation of its own) goes back to its own layers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.activations import SiLUActivation

from manylora.models.attention import AttentionOptions
from manylora.models.batch import ForwardContext
from manylora.models.kv_cache import KVCache
from manylora.models.linear import AdaptedLinear, FusedMember
from manylora.models.operators import LayerOperators
from manylora.models.wrapping import WrappedModel

_LAYER_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj"}
_SILU = (nn.SiLU, SiLUActivation)


@dataclass(frozen=True, slots=True)
class Norm:
    """Root mean square norm: weight * x / rms(x)."""

    weight: torch.Tensor
    eps: float


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


class Rotary:
    """The step's rotary embedding in the form that the operators want; every layer of a step is given the same."""

    def __init__(self, ops: LayerOperators) -> None:
        self._ops = ops
        self._given: torch.Tensor | None = None
        self._prepared = torch.empty(0), torch.empty(0)

    def of(self, given: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """From cos and sin, each [1, T, rotary_dim]; prepared once per step."""
        if given[0] is not self._given:
            self._given = given[0]
            self._prepared = self._ops.rotary(given[0][0], given[1][0])
        return self._prepared


class FusedDecoderLayer(nn.Module):
    """Stands where a decoder layer stood; [1, T, hidden] -> [1, T, hidden], in place."""

    def __init__(
        self,
        parts: LayerParts,
        keys: torch.Tensor,
        values: torch.Tensor,
        context: ForwardContext,
        ops: LayerOperators,
        rotary: Rotary,
    ) -> None:
        super().__init__()
        self._parts = parts
        self._keys = keys
        self._values = values
        self._context = context
        self._ops = ops
        self._rotary = rotary
        self._heads = (-1, keys.shape[3])

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **kwargs: Any,
    ) -> torch.Tensor:
        p, ops, keys, values = self._parts, self._ops, self._keys, self._values
        batch = self._context.current()
        residual = hidden_states.view(-1, hidden_states.shape[-1])
        qkv = p.qkv(ops.rms_norm(residual, p.input_norm.weight, p.input_norm.eps)).unflatten(1, self._heads)
        attended = ops.attend(qkv, self._rotary.of(position_embeddings), keys, values, batch, p.options)
        normed = ops.add_rms_norm_(residual, p.o(attended.flatten(1)), p.mlp_norm.weight, p.mlp_norm.eps)
        residual += p.down(ops.silu_and_mul(p.gate_up(normed)))
        return hidden_states


def fuse(wrapped: WrappedModel, cache: KVCache, ops: LayerOperators) -> dict[str, nn.Module]:
    """Replace every layer of the usual shape. Returns the originals by path, for `undo`; empty if there are none."""
    rotary = Rotary(ops)
    originals: dict[str, nn.Module] = {}
    for path, module in list(wrapped.model.named_modules()):
        if {name for name, _ in module.named_children()} == _LAYER_PARTS:
            parts = _recognise(module, wrapped)
            if parts is not None:
                originals[path] = module
                layer = layer_index(module.get_submodule("self_attn"))
                fused = FusedDecoderLayer(parts, cache.keys[layer], cache.values[layer], wrapped.context, ops, rotary)
                wrapped.model.set_submodule(path, fused)
    return originals


def undo(wrapped: WrappedModel, originals: dict[str, nn.Module]) -> None:
    """Put the model's own layers back."""
    for path, module in originals.items():
        wrapped.model.set_submodule(path, module)


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
    index = layer_index(attention)
    return LayerParts(
        input_norm=input_norm,
        qkv=qkv,
        o=o,
        mlp_norm=mlp_norm,
        gate_up=gate_up,
        down=down,
        options=wrapped.survey.options[index],
    )


def layer_index(attention: nn.Module) -> int:
    """The layer's place in the cache, as transformers numbers it."""
    index = getattr(attention, "layer_idx", None)
    assert isinstance(index, int)
    return index


def _group(*members: nn.Module) -> AdaptedLinear | None:
    """The one matmul behind `members`, if that is what they are, in this order and no others beside them."""
    shared = {id(m.fused): m.fused for m in members if isinstance(m, FusedMember)}
    if len(shared) != 1 or not all(isinstance(m, FusedMember) and m.member == i for i, m in enumerate(members)):
        return None
    fused = next(iter(shared.values()))
    return fused.linear if len(fused.widths) == len(members) else None


def _norm(module: nn.Module) -> Norm | None:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, torch.Tensor) or eps is None:
        return None
    return Norm(weight.detach(), float(eps))
