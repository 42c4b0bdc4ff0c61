"""Turning a Hugging Face decoder into one that runs our ragged batch, without a file per architecture.

One short pass over the untouched model tells what cannot be read off its classes: which linears share their
input (and can be one matmul), how many key-value heads each layer has, and the logits that the wrapped model
must reproduce.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from manylora.errors import ModelUnusable
from manylora.lora.format import ModuleSpec
from manylora.lora.kernels import SiteGroup
from manylora.models import attention
from manylora.models.batch import ForwardContext
from manylora.models.kv_cache import KVCache, KVShape
from manylora.models.linear import AdaptedEmbedding, AdaptedLinear, FusedLinears, FusedMember
from manylora.models.matmul import MatmulFactory, factory

PROBE_LENGTH = 12
_numbers = itertools.count()


@dataclass(slots=True)
class Survey:
    """What one pass over the untouched model showed. `groups`: paths of linears that read the same input."""

    kv_shapes: list[KVShape] = field(default_factory=list)
    options: list[attention.AttentionOptions] = field(default_factory=list)
    groups: list[list[str]] = field(default_factory=list)
    token_ids: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(slots=True)
class WrappedModel:
    """A model whose linears, embedding and attention are ours. `modules` are in the order of their sites."""

    model: PreTrainedModel
    context: ForwardContext
    survey: Survey
    modules: dict[str, ModuleSpec]
    sites: dict[str, int]

    def attach_cache(self, cache: KVCache, *, use_native: bool) -> None:
        """Attend over this cache from now on, by the C++ kernels or in torch operations."""
        name = f"manylora-{next(_numbers)}"
        attention.register(name, attention.paged_attention_function(cache, self.context, use_native=use_native))
        self.model.set_attn_implementation(name)


def survey(model: PreTrainedModel) -> Survey:
    """Run a few tokens through the untouched model. Raises ModelUnusable when it is no causal decoder we can serve."""
    found = Survey()
    vocab = int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    found.token_ids = torch.randint(0, vocab, (PROBE_LENGTH,), generator=generator)
    device = model.get_input_embeddings().weight.device
    inputs = {
        "input_ids": found.token_ids[None].to(device),
        "position_ids": torch.arange(PROBE_LENGTH, device=device)[None],
        "use_cache": False,
    }
    name = f"manylora-survey-{next(_numbers)}"
    with torch.inference_mode():
        found.logits = model(**inputs).logits[0].float()
        before = model.config._attn_implementation
        attention.register(name, _recording_attention(found))
        model.set_attn_implementation(name)
        with _recording_inputs(model, found):
            model(**inputs)
        model.set_attn_implementation(before)
    if not found.kv_shapes:
        raise ModelUnusable(
            f"{type(model).__name__} does not use transformers' attention interface, so it cannot be served."
        )
    return found


def _recording_attention(found: Survey) -> attention.AttentionFunction:
    def record(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        options = attention.read_options(module, query.shape[-1], kwargs)
        if key.shape != value.shape or getattr(module, "layer_idx", None) != len(found.kv_shapes):
            raise ModelUnusable(f"{type(module).__name__} has a cache layout that is not supported.")
        found.options.append(options)
        found.kv_shapes.append(KVShape(key.shape[1], key.shape[3]))
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
        return attention.prefill(q, k.transpose(0, 1), v.transpose(0, 1), options).unsqueeze(0), None

    return record


@contextmanager
def _recording_inputs(model: PreTrainedModel, found: Survey) -> Iterator[None]:
    """Group linears by the very tensor they are called with; hold the tensors so that no address is used twice."""
    seen: dict[tuple[str, int], list[str]] = {}
    held: list[torch.Tensor] = []
    hooks = []

    def hook(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def record(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            held.append(args[0])
            seen.setdefault((path.rpartition(".")[0], id(args[0])), []).append(path)

        return record

    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            hooks.append(module.register_forward_pre_hook(hook(path)))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
    found.groups = list(seen.values())


def weight_of(module: nn.Module) -> torch.Tensor:
    """A linear's weight as [out_features, in_features], whichever way the module keeps it."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight.detach().t().contiguous() if isinstance(module, Conv1D) else weight.detach()


def adaptable_modules(model: PreTrainedModel) -> dict[str, ModuleSpec]:
    """Every linear and the token embedding of an untouched model (a meta-device one will do), by path."""
    embedding = model.get_input_embeddings()
    found: dict[str, ModuleSpec] = {}
    for path, module in model.named_modules():
        if module is embedding:
            found[path] = ModuleSpec(path, "embedding", *module.weight.shape)
        elif isinstance(module, Conv1D):
            found[path] = ModuleSpec(path, "conv1d", *module.weight.shape)
        elif isinstance(module, nn.Linear):
            found[path] = ModuleSpec(path, "linear", module.in_features, module.out_features)
    return found


def wrap(model: PreTrainedModel, make_matmul: MatmulFactory | None = None) -> WrappedModel:
    """Replace linears, embedding and attention by ours, in place. Raises ModelUnusable."""
    make = make_matmul or factory()
    found = survey(model)
    specs = adaptable_modules(model)
    groups = _complete_groups(found.groups, specs)
    ordered = [path for group in groups for path in group]
    wrapped = WrappedModel(
        model,
        ForwardContext(),
        found,
        modules={path: specs[path] for path in ordered},
        sites={path: site for site, path in enumerate(ordered)},
    )
    head = model.get_output_embeddings()
    with torch.inference_mode():
        for group in groups:
            first = model.get_submodule(group[0])
            if specs[group[0]].kind == "embedding":
                embedding = AdaptedEmbedding(first, wrapped.sites[group[0]], wrapped.context)
                model.set_submodule(group[0], embedding)
            else:
                _replace_linears(wrapped, group, make, on_logit_rows=first is head)
    return wrapped


def _complete_groups(groups: list[list[str]], specs: dict[str, ModuleSpec]) -> list[list[str]]:
    """Groups that can be fused stay together; every other module stands alone."""
    fused = [g for g in groups if len(g) > 1 and len(set(g)) == len(g)]
    taken = {path for group in fused for path in group}
    leaders = {group[0]: group for group in fused}
    return [leaders.get(path, [path]) for path in specs if path in leaders or path not in taken]


def _replace_linears(wrapped: WrappedModel, group: list[str], make: MatmulFactory, *, on_logit_rows: bool) -> None:
    modules = [wrapped.model.get_submodule(path) for path in group]
    weights = [weight_of(m) for m in modules]
    widths = tuple(w.shape[0] for w in weights)
    biases = [m.bias.detach() if isinstance(m.bias, torch.Tensor) else None for m in modules]
    weight, bias = weights[0], biases[0]
    if len(group) > 1:
        weight = torch.cat(weights)
        if any(b is not None for b in biases):
            bias = torch.cat([b if b is not None else weight.new_zeros(w) for b, w in zip(biases, widths, strict=True)])
    offsets = tuple(itertools.accumulate(widths, initial=0))
    site_group = SiteGroup(
        wrapped.sites[group[0]], offsets, torch.tensor(offsets, dtype=torch.int32, device=weight.device)
    )
    matmul = make(weight, bias)
    linear = AdaptedLinear(
        matmul, site_group, wrapped.context, in_features=weight.shape[1], on_logit_rows=on_logit_rows
    )
    if len(group) == 1:
        wrapped.model.set_submodule(group[0], linear)
        return
    fused = FusedLinears(linear, widths)
    for member, path in enumerate(group):
        wrapped.model.set_submodule(path, FusedMember(fused, member))
