"""Which modules of a model an adapter may touch, and what they are."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from manylora.lora.format.reader import ModuleSpec
from manylora.models.kv_cache import KVShape
from manylora.models.positions import position_limit
from manylora.models.states import state_layers

__all__ = [
    "adaptable_modules",
    "adaptable_norms",
    "embedding_scale",
    "first_position",
    "hidden_size",
    "is_linear",
    "is_plain",
    "stated_shapes",
    "token_embedding",
    "weight_of",
    "with_past",
]


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def is_plain(module: nn.Module) -> bool:
    """Whether a linear computes x W^T + b and nothing else: a subclass may have a forward of its own."""
    return type(module).forward in (nn.Linear.forward, Conv1D.forward) and "forward" not in vars(module)


def weight_of(module: nn.Module) -> torch.Tensor:
    """A linear's weight as [out_features, in_features], whichever way the module keeps it."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight.detach().t().contiguous() if isinstance(module, Conv1D) else weight.detach()


def token_embedding(model: PreTrainedModel) -> Any:
    """The module that turns token ids into vectors; None of a model that has none, as those of images."""
    found = model.get_input_embeddings()
    weight = getattr(found, "weight", None)
    return found if isinstance(weight, torch.Tensor) and weight.dim() == 2 else None


def hidden_size(model: PreTrainedModel) -> int:
    """Numbers of a hidden state, by the embedding's rows where there is one."""
    embedding = token_embedding(model)
    return int(model.config.hidden_size if embedding is None else embedding.weight.shape[1])


def embedding_scale(embedding: nn.Module) -> float:
    """What the embedding multiplies its rows by, and PEFT an adapter's delta alike; 1 where nothing."""
    scale = getattr(embedding, "embed_scale", None)
    return 1.0 if scale is None else float(scale)


def first_position(model: PreTrainedModel) -> int:
    """The number of a decoder's first position: 0, or where positions have a row for padding in a table, the next."""
    tokens, limit = token_embedding(model), position_limit(model.config)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not tokens and module.num_embeddings == limit:
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def adaptable_modules(model: PreTrainedModel) -> dict[str, ModuleSpec]:
    """Every linear and the token embedding of an untouched model (a meta-device one will do), by path."""
    embedding, head = token_embedding(model), model.get_output_embeddings()
    is_tied = isinstance(head, nn.Linear) and embedding is not None and head.weight is embedding.weight
    grows = isinstance(head, nn.Linear) and embedding is not None and head.out_features == embedding.weight.shape[0]
    found: dict[str, ModuleSpec] = {}
    for path, module in model.named_modules():
        if module is embedding:
            rows, width = module.weight.shape
            found[path] = ModuleSpec(path, "embedding", rows, width, is_tied=is_tied, grows=grows)
        elif isinstance(module, Conv1D):
            found[path] = ModuleSpec(path, "conv1d", *module.weight.shape)
        elif isinstance(module, nn.Linear):
            found[path] = ModuleSpec(
                path,
                "linear",
                module.in_features,
                module.out_features,
                is_tied=is_tied and module is head,
                is_head=module is head,
                grows=grows and module is head,
            )
    return found


def with_past(modules: Mapping[str, ModuleSpec], shapes: Sequence[KVShape]) -> dict[str, ModuleSpec]:
    """The modules, of which the embedding knows the keys and values of a token, where all layers have the same."""
    one = shapes[0] if shapes and len(set(shapes)) == 1 and shapes[0].head_dim == shapes[0].value_dim else None
    past = None if one is None else (len(shapes), one.num_heads, one.head_dim)
    return {path: replace(spec, past=past) if spec.kind == "embedding" else spec for path, spec in modules.items()}


def stated_shapes(config: Any) -> list[KVShape]:
    """Each layer's keys and values as a Hugging Face config has them; none where it does not say."""
    text = config.get_text_config()
    layers, heads = getattr(text, "num_hidden_layers", None), getattr(text, "num_attention_heads", None)
    hidden = getattr(text, "hidden_size", None)
    has_others = bool(getattr(text, "kv_lora_rank", None)) or bool(state_layers(config))
    if has_others or not (isinstance(layers, int) and isinstance(heads, int) and isinstance(hidden, int)):
        return []
    size, own = getattr(text, "head_dim", None) or hidden // heads, getattr(text, "num_key_value_heads", None) or heads
    return [KVShape(own, size, size)] * layers


def adaptable_norms(model: PreTrainedModel) -> dict[str, ModuleSpec]:
    """Every norm of the residual stream, by path: those of single heads, which are narrower, are left out."""
    width = hidden_size(model)
    found: dict[str, ModuleSpec] = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if _is_norm(module) and isinstance(weight, torch.Tensor) and tuple(weight.shape) == (width,):
            found[path] = ModuleSpec(path, "norm", width, width)
    return found


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
