"""Turning a Hugging Face decoder into one that runs our ragged batch, without a file per architecture.

The survey (`survey.py`) says what the untouched model does; then its linears, its embedding and its attention are
replaced by ours.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from manylora.errors import ModelUnusable
from manylora.kernels.batch import Batch, ForwardContext
from manylora.kernels.interface import SiteGroup
from manylora.kernels.matmul import BaseMatmul, dense
from manylora.kernels.weights import WeightFormat
from manylora.lora.format.reader import ModuleSpec
from manylora.models import attention, older
from manylora.models.backends import Backend
from manylora.models.kv_cache import KVCache
from manylora.models.linear import (
    AdaptedEmbedding,
    AdaptedLinear,
    AdaptedNorm,
    FusedLinears,
    FusedMember,
    KeptLinear,
)
from manylora.models.mixtures import adapt_experts, adapt_router, served_experts
from manylora.models.modules import (
    adaptable_modules,
    adaptable_norms,
    embedding_scale,
    first_position,
    is_linear,
    weight_of,
    with_past,
)
from manylora.models.positions import UNSTATED_LIMIT, position_limit
from manylora.models.refusals import refusing
from manylora.models.served_base import ServedEmbedding, ServedLinear, ServedModule, ServedNorm
from manylora.models.states import StateStore, run_by_pieces, state_layers
from manylora.models.survey import SAME, Survey, survey

__all__ = ["WrappedModel", "adaptable_modules", "weight_of", "wrap", "wrap_surveyed"]

_numbers = itertools.count()


@dataclass(slots=True)
class WrappedModel:
    """A model whose linears, embedding, norms and attention are ours.

    `modules` are in the order of their sites, experts and norms last; `served` has what the base computes with at each.
    `states`: those of the sequences, where layers keep some.
    """

    model: PreTrainedModel
    backend: Backend
    context: ForwardContext
    survey: Survey
    modules: dict[str, ModuleSpec]
    sites: dict[str, int]
    served: dict[str, ServedModule]
    states: StateStore | None = None

    @property
    def vocab_size(self) -> int:
        """Ids below this are tokens: they have a row of the embedding and a logit."""
        rows = int(self.model.get_input_embeddings().weight.shape[0])
        return min(rows, self.survey.num_logits)

    @property
    def hidden_size(self) -> int:
        """Numbers of a token's hidden state, as the head gets it; 0 for a model that is no head over a body."""
        if self.model.base_model is self.model:
            return 0
        return int(self.model.get_input_embeddings().weight.shape[1])

    def position_ids(self, batch: Batch) -> torch.Tensor:
        """The positions of a batch as the model numbers them, int64 [1, T]."""
        first = self.survey.first_position
        return (batch.positions + first if first else batch.positions)[None]

    def attach_cache(self, cache: KVCache) -> None:
        """Attend over this cache from now on."""
        name, found = f"manylora-{next(_numbers)}", self.survey
        function = attention.paged_attention_function(
            cache, self.context, found.options, found.places, self.backend.attention
        )
        if older.is_older(self.model):
            older.adapt(self.model, function)
            return
        attention.register(name, function)
        self.model.set_attn_implementation(name)


def wrap(model: PreTrainedModel, backend: Backend, *, context_length: int | None = None) -> WrappedModel:
    """Replace linears, embedding and attention by ours, in place. Raises ModelUnusable.

    `context_length`: how far sequences will reach; unless told, as far as the model's config allows.
    """
    own = position_limit(model.config)
    found = survey(model, context_length or (own - first_position(model) if own else UNSTATED_LIMIT))
    with refusing(model, "its parts were replaced"), torch.inference_mode():
        wrapped = wrap_surveyed(model, backend, found)
        if found.keepers:
            wrapped.states = StateStore(state_layers(model.config))
            for path, layer in found.keepers.items():
                run_by_pieces(model.get_submodule(path), layer, wrapped.context)
        return wrapped


def wrap_surveyed(
    model: PreTrainedModel, backend: Backend, found: Survey, norms: Mapping[str, ModuleSpec] | None = None
) -> WrappedModel:
    """Replace linears, norms and embedding by ours, in place. Attention is left to the caller.

    `norms`: those that adapters may touch, all of the residual stream where none are named.
    """
    specs = found.modules
    groups = _complete_groups(found.groups, specs)
    norms = adaptable_norms(model) if norms is None else norms
    experts = served_experts(model, SAME.get(model.dtype, SAME[torch.bfloat16]))
    modules = {path: replace(specs[path], shares_input=len(group) > 1) for group in groups for path in group}
    modules = with_past(modules, found.kv_shapes if not found.keepers else []) | experts | dict(norms)
    sites = {path: site for site, path in enumerate(modules)}
    wrapped = WrappedModel(model, backend, ForwardContext(), found, modules, sites, {})
    adapt_experts(model, {path: sites[path] for path in experts}, wrapped.context, backend.experts)
    for path, spec in [(path, spec) for path, spec in experts.items() if spec.kind == "linear"]:
        weight = adapt_router(model, spec, sites[path], wrapped.context, backend.experts)
        wrapped.served[path] = ServedLinear(dense(weight, None), 0, spec.out_features, spec.in_features, None)
    tied = _Tied(model)
    for path, spec in norms.items():
        norm = model.get_submodule(path)
        wrapped.served[path] = ServedNorm(norm)
        model.set_submodule(path, AdaptedNorm(norm, sites[path], spec.out_features, wrapped.context))
    for group in groups:
        if specs[group[0]].kind == "embedding":
            first = model.get_submodule(group[0])
            wrapped.served[group[0]] = ServedEmbedding(first.weight.detach())
            embedding = AdaptedEmbedding(first, wrapped.sites[group[0]], wrapped.context, embedding_scale(first))
            model.set_submodule(group[0], embedding)
        elif group[0] in found.kept:
            _keep_linear(wrapped, group[0])
        else:
            _replace_linears(wrapped, group, tied)
    return wrapped


class _Tied:
    """The products of linears that have their weights in common: made once, whatever form they are kept in."""

    def __init__(self, model: PreTrainedModel) -> None:
        owners = Counter(id(module.weight) for module in model.modules() if is_linear(module))
        self._shared = {weight for weight, count in owners.items() if count > 1}
        self._made: dict[tuple[int, ...], BaseMatmul] = {}

    def product(self, modules: Sequence[nn.Module], make: Callable[[], BaseMatmul]) -> BaseMatmul:
        """The product of linears side by side. `make` makes it, for the first of those with the same weights."""
        weights = tuple(id(module.weight) for module in modules)
        if not self._shared.issuperset(weights):
            return make()
        biases = tuple(id(module.bias) for module in modules)
        if (weights + biases) not in self._made:
            self._made[weights + biases] = make()
        return self._made[weights + biases]


def _complete_groups(groups: list[list[str]], specs: dict[str, ModuleSpec]) -> list[list[str]]:
    """Groups that can be fused stay together; every other module stands alone."""
    fused = [g for g in groups if len(g) > 1 and len(set(g)) == len(g) and all(path in specs for path in g)]
    # A module that runs more than once may share its input with others each time.
    fused = [g for g in fused if all(g == other or not set(g) & set(other) for other in groups)]
    taken = {path for group in fused for path in group}
    leaders = {group[0]: group for group in fused}
    return [leaders.get(path, [path]) for path in specs if path in leaders or path not in taken]


def _require_close(
    matmul: BaseMatmul, weight: torch.Tensor, bias: torch.Tensor | None, path: str, kept: WeightFormat
) -> None:
    """Refuse a linear whose weight is rounded where it differs from the whole one by more than that.

    Rounding moves the logits of a deep model so far that the check of the whole says little of a single linear.
    """
    most = kept.tolerance(weight.dtype).linear
    if most is None:
        return
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, weight.shape[1], generator=random).to(weight.dtype)
    wanted = functional.linear(x, weight, bias).float()
    difference = float(
        (matmul(x).float() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt().clamp(min=1e-6)
    )
    if not difference <= most:
        raise ModelUnusable(
            f"{path} cannot be kept in {kept.name}: its outputs differ by {difference:.2g} of their size, "
            f"{most} is allowed. Leave out --quantization {kept.name}."
        )


def _keep_linear(wrapped: WrappedModel, path: str) -> None:
    """Put a `KeptLinear` around a linear that computes by code of its own, or whose weight other code reads."""
    module, spec, site = wrapped.model.get_submodule(path), wrapped.modules[path], wrapped.sites[path]
    bias = module.bias.detach() if isinstance(module.bias, torch.Tensor) else None
    kept = dense(weight_of(module), None)
    wrapped.served[path] = ServedLinear(kept, 0, spec.out_features, spec.in_features, bias)
    offsets = (0, spec.out_features)
    group = SiteGroup(site, offsets, torch.tensor(offsets, dtype=torch.int32, device=weight_of(module).device))
    on_logit_rows = path in wrapped.survey.on_logit_rows
    wrapped.model.set_submodule(
        path,
        KeptLinear(module, group, wrapped.context, in_features=spec.in_features, on_logit_rows=on_logit_rows),
    )


def _replace_linears(wrapped: WrappedModel, group: list[str], tied: _Tied) -> None:
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
    is_head = group[0] in wrapped.survey.on_logit_rows
    make = wrapped.backend.head if is_head else wrapped.backend.matmul
    matmul = tied.product(modules, lambda: make(weight, bias))
    _require_close(matmul, weight, bias, group[0], wrapped.backend.format)
    for path, first, width, own in zip(group, offsets, widths, biases, strict=False):
        wrapped.served[path] = ServedLinear(matmul, first, width, weight.shape[1], own)
    linear = AdaptedLinear(
        matmul,
        site_group,
        wrapped.context,
        in_features=weight.shape[1],
        on_logit_rows=is_head,
    )
    if len(group) == 1:
        wrapped.model.set_submodule(group[0], linear)
        return
    fused = FusedLinears(linear, widths)
    for member, path in enumerate(group):
        wrapped.model.set_submodule(path, FusedMember(fused, member))
