"""Which experts and routers of a mixture adapters may touch, and ours in the place of the model's.

Most models compute their experts behind transformers' interface (`models/experts.py`), some in ways of their own
(`models/own_experts.py`). Ours stand in their place only where both compute the same of random rows.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from manylora.kernels.batch import ForwardContext
from manylora.kernels.interface import SiteGroup
from manylora.kernels.matmul import MatmulFactory
from manylora.lora.format.spec import ModuleSpec
from manylora.models.experts import AdaptedExperts, AdaptedRouter, InterfaceHolder, is_router_served
from manylora.models.modules import is_linear, is_plain
from manylora.models.own_experts import BatchedHolder, IdleHolder, OwnExperts, ParallelHolder

__all__ = ["Holder", "adapt_experts", "adapt_router", "adaptable_experts", "holders", "served_experts"]


class Holder(Protocol):
    """A module that holds weights of a layer's experts."""

    @property
    def path(self) -> str:
        """Of the module."""

    @property
    def num_experts(self) -> int:
        """Rows of the router's weight."""

    def specs(self) -> Iterator[ModuleSpec]:
        """The parameters that adapters may touch, in the order in which the module has them."""

    def agrees(self, tolerance: float) -> bool:
        """Whether ours computes the same of random rows, within a share of their size."""

    def replacement(self, sites: Mapping[str, int], context: ForwardContext) -> AdaptedExperts | OwnExperts:
        """Ours. `sites`: of the parameters, by name."""


def holders(model: PreTrainedModel) -> Iterator[Holder]:
    """Of an untouched model, by path."""
    kinds: tuple[Callable[[str, nn.Module, nn.Module], Holder | None], ...] = (
        InterfaceHolder.of, BatchedHolder.of, IdleHolder.of, ParallelHolder.of,
    )  # fmt: skip
    for path, module in model.named_modules():
        owner = model.get_submodule(path.rpartition(".")[0])
        yield from (found for of in kinds if (found := of(path, module, owner)) is not None)


def adaptable_experts(model: PreTrainedModel) -> dict[str, ModuleSpec]:
    """Every parameter of experts, and the router beside them, of an untouched model (a meta-device one will do).

    In the order in which PEFT goes through them, by path; an adapter names them in `target_parameters`.
    """
    found: dict[str, ModuleSpec] = {}
    for holder in holders(model):
        owner = holder.path.rpartition(".")[0]
        for name, module in model.get_submodule(owner).named_children():
            if _is_router(module, holder.num_experts):
                router, (outside, inside) = f"{owner}.{name}", module.weight.shape
                found[router] = ModuleSpec(router, "linear", inside, outside, is_parameter=True)
        found |= {spec.path: spec for spec in holder.specs()}
    return found


def _is_router(module: nn.Module, num_experts: int) -> bool:
    """Whether a module chooses experts by a weight of its own: a row for each of them."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or weight.shape[0] != num_experts:
        return False
    return not is_linear(module) or not is_plain(module)


def served_experts(model: PreTrainedModel, tolerance: float) -> dict[str, ModuleSpec]:
    """The experts that our own matmuls compute as the model's code does, within a share of their size."""
    found = adaptable_experts(model)
    for holder in holders(model):
        if not holder.agrees(tolerance):
            for spec in holder.specs():
                del found[spec.path]
    for path, spec in [(each, spec) for each, spec in found.items() if spec.kind == "linear"]:
        if not is_router_served(model.get_submodule(path), spec.in_features, spec.out_features):
            del found[path]
    return found


def adapt_experts(
    model: PreTrainedModel, sites: Mapping[str, int], context: ForwardContext, make: MatmulFactory | None
) -> None:
    """Put ours around the experts whose parameters have `sites`, by path; they multiply by what `make` makes."""
    for holder in list(holders(model)):
        own = {path.rpartition(".")[2]: sites[path] for path in (each.path for each in holder.specs()) if path in sites}
        if own:
            adapted = holder.replacement(own, context)
            if make is not None:
                adapted.take_over(make)
            model.set_submodule(holder.path, adapted)


def adapt_router(
    model: PreTrainedModel, spec: ModuleSpec, site: int, context: ForwardContext, make: MatmulFactory | None
) -> torch.Tensor:
    """Put ours around a router; its weight [experts, hidden]."""
    router = model.get_submodule(spec.path)
    weight = router.weight
    assert isinstance(weight, torch.Tensor)
    offsets = (0, spec.out_features)
    group = SiteGroup(site, offsets, torch.tensor(offsets, dtype=torch.int32, device=weight.device))
    model.set_submodule(spec.path, AdaptedRouter(router, group, context, make))
    return weight.detach()
