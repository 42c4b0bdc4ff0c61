"""Mixtures of experts: the experts' fused weights and the router as modules that adapters may touch.

Transformers keeps the experts of a layer in one parameter, [experts, out, in], and computes them behind one interface
(`use_experts_implementation`): each token's rows go through the experts that the router has chosen for it. Here rows
are grouped by expert, and each that is chosen is one product over its rows, by the matmul that the backend has for
them; where it has none, a step in which no adapter touches them runs the model's own code.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from manylora.kernels.batch import ForwardContext
from manylora.kernels.interface import LoraPlan, SiteGroup
from manylora.kernels.matmul import BaseMatmul, MatmulFactory
from manylora.lora.format.spec import ModuleSpec
from manylora.models.modules import is_linear, is_plain

__all__ = ["AdaptedExperts", "AdaptedRouter", "adaptable_experts", "containers", "is_router_served"]

_MARKS = ("num_experts", "has_gate", "is_transposed", "has_bias", "has_post_expert_norm")


def containers(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """The modules that hold a layer's experts behind transformers' interface, by path."""
    for path, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if all(hasattr(module, mark) for mark in _MARKS) and _first(module) in parameters and "down_proj" in parameters:
            yield path, module


def adaptable_experts(model: PreTrainedModel) -> dict[str, ModuleSpec]:
    """Every parameter of experts, and the router beside them, of an untouched model (a meta-device one will do).

    In the order in which PEFT goes through them, by path; an adapter names them in `target_parameters`.
    """
    found: dict[str, ModuleSpec] = {}
    for path, experts in containers(model):
        owner = path.rpartition(".")[0]
        for name, module in model.get_submodule(owner).named_children():
            if _is_router(module, experts.num_experts):
                router = f"{owner}.{name}"
                found[router] = ModuleSpec(router, "linear", *_widths(module), is_parameter=True)
        for name, weight in experts.named_parameters(recurse=False):
            if name in (_first(experts), "down_proj"):
                inside, outside = _sizes(experts, weight)
                whole = f"{path}.{name}"
                found[whole] = ModuleSpec(
                    whole, "experts", inside, outside, is_parameter=True, num_experts=int(weight.shape[0])
                )
    return found


def _first(experts: Any) -> str:
    """The name of the weight that the experts' input is multiplied by."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _sizes(experts: Any, weight: torch.Tensor) -> tuple[int, int]:
    """(in, out) of each expert."""
    one, other = int(weight.shape[1]), int(weight.shape[2])
    return (one, other) if experts.is_transposed else (other, one)


def _widths(router: Any) -> tuple[int, int]:
    """(in, experts) of a router."""
    return int(router.weight.shape[1]), int(router.weight.shape[0])


def _is_router(module: nn.Module, num_experts: int) -> bool:
    """Whether a module chooses experts by a weight of its own: a row for each of them."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or weight.shape[0] != num_experts:
        return False
    return not is_linear(module) or not is_plain(module)


class AdaptedExperts(nn.Module):
    """A layer's experts, with low-rank deltas on what each of them multiplies by."""

    def __init__(self, base: Any, sites: Mapping[str, int], context: ForwardContext) -> None:
        super().__init__()
        self.base = base
        self._first = _first(base)
        self._sites = sites
        self._context = context
        self._products: dict[str, list[BaseMatmul]] = {}

    def take_over(self, make: MatmulFactory) -> None:
        """Bring each expert's weights into the form that a backend multiplies by, and leave out the model's own."""
        for name in (self._first, "down_proj"):
            weights = getattr(self.base, name)
            biases = getattr(self.base, f"{name}_bias") if self.base.has_bias else [None] * len(weights)
            self._products[name] = [
                make(
                    (weight.T if self.base.is_transposed else weight).detach(), None if bias is None else bias.detach()
                )
                for weight, bias in zip(weights, biases, strict=True)
            ]
            setattr(self.base, name, None)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, hidden] of [T, hidden], the numbers of the experts chosen and their weights, [T, k] each."""
        batch = self._context.current()
        plan = batch.lora
        is_touched = plan is not None and plan.rows.touches(self._sites.values())
        if not is_touched and self._products:
            return self.compute(hidden_states, top_k_index, top_k_weights, None)
        if plan is None or not is_touched:
            own: torch.Tensor = self.base(hidden_states, top_k_index, top_k_weights)
            return own
        if hidden_states.shape[0] != batch.token_ids.shape[0]:
            raise RuntimeError(f"experts run on {hidden_states.shape[0]} rows in a step of {batch.token_ids.shape[0]}")
        return self.compute(hidden_states, top_k_index, top_k_weights, plan)

    def compute(
        self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, plan: LoraPlan | None
    ) -> torch.Tensor:
        """What the experts compute, expert by expert, with the deltas of a plan's adapters or with none."""
        base, (count, most) = self.base, chosen.shape
        experts, order = torch.sort(chosen.reshape(-1), stable=True)
        rows = order // most
        bounds = torch.bincount(experts, minlength=base.num_experts).cumsum(0).tolist()

        def product(x: torch.Tensor, name: str) -> torch.Tensor:
            out = self._by_expert(x, name, bounds)
            if plan is not None and plan.rows.touches((self._sites[name],)):
                plan.add_experts_(out, x, rows, bounds, self._sites[name])
            return out

        inner = product(hidden[rows], self._first)
        inner = base._apply_gate(inner) if base.has_gate else base.act_fn(inner)
        found = product(inner, "down_proj")
        if base.has_post_expert_norm:
            found = base.post_expert_norm(found)
        found = found * weights.reshape(-1)[order, None]
        in_order = torch.empty_like(found)
        in_order[order] = found
        return in_order.view(count, most, -1).sum(dim=1).to(hidden.dtype)

    def _by_expert(self, x: torch.Tensor, name: str, bounds: list[int]) -> torch.Tensor:
        products = self._products.get(name)
        if products is not None:
            ends = zip(products, (0, *bounds), bounds, strict=False)
            return torch.cat([product(x[begin:end]) for product, begin, end in ends if begin < end])
        weights = getattr(self.base, name)
        biases = getattr(self.base, f"{name}_bias") if self.base.has_bias else None
        out = x.new_empty(x.shape[0], weights.shape[2 if self.base.is_transposed else 1])
        begin = 0
        for expert, end in enumerate(bounds):
            if begin < end:
                weight = weights[expert].T if self.base.is_transposed else weights[expert]
                bias = None if biases is None else biases[expert]
                out[begin:end] = functional.linear(x[begin:end], weight, bias)
            begin = end
        return out

    def agrees(self, tolerance: float) -> bool:
        """Whether the base's own code computes the same of random rows, within a share of their size."""
        base = self.base
        weight = getattr(base, self._first)
        random = torch.Generator().manual_seed(0)
        hidden = torch.randn(6, _sizes(base, weight)[0], generator=random)
        chosen = torch.stack([torch.randperm(base.num_experts, generator=random)[:2] for _ in hidden])
        weights = torch.rand(chosen.shape, generator=random)
        given = (hidden.to(weight), chosen.to(weight.device), weights.to(weight))
        try:
            wanted, found = base(*given).float(), self.compute(*given, None).float()
        except Exception:  # noqa: BLE001 - it is called in another way
            return False
        return bool((found - wanted).square().mean().sqrt() <= tolerance * wanted.square().mean().sqrt())


class AdaptedRouter(nn.Module):
    """A router, whose weight adapters may change: the delta is added where its own code multiplies by the weight.

    With a `make` it multiplies by what that makes of the weight.
    """

    def __init__(
        self, base: nn.Module, group: SiteGroup, context: ForwardContext, make: MatmulFactory | None = None
    ) -> None:
        super().__init__()
        self.base = base
        self.group = group
        self._context = context
        self._make = make
        self._held: dict[torch.dtype, BaseMatmul] = {}

    def __getattr__(self, name: str) -> Any:
        """What the model's own code asks of its router beside calling it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        batch = self._context.current()
        plan = batch.lora
        if plan is not None and not plan.rows.touches(self.group.sites):
            plan = None
        if plan is None and self._make is None:
            return self.base(*args, **kwargs)

        def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            rows = x.reshape(-1, x.shape[-1])
            found = self._multiplied(rows, weight, bias)
            if plan is not None:
                if rows.shape[0] != batch.token_ids.shape[0]:
                    raise RuntimeError(f"a router runs on {rows.shape[0]} rows in a step of {batch.token_ids.shape[0]}")
                plan.add_(found, rows.to(found.dtype), self.group)
            return found.view(*x.shape[:-1], -1)

        assert isinstance(self.base.weight, torch.Tensor)
        with _Multiplying(self.base.weight, product):
            return self.base(*args, **kwargs)

    def _multiplied(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self._make is None:
            return functional.linear(rows, weight, bias)
        held = self._held.get(weight.dtype)
        if held is None:
            held = self._held[weight.dtype] = self._make(weight, bias)
        return held(rows)


def is_router_served(router: nn.Module, width: int) -> bool:
    """Whether a router multiplies its weight once with all rows of a step [T, width], by `linear`."""
    seen: list[int] = []

    def note(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        seen.append(x.numel() // x.shape[-1])
        return functional.linear(x, weight, bias)

    assert isinstance(router.weight, torch.Tensor)
    try:
        with _Multiplying(router.weight, note):
            router(torch.zeros(6, width).to(router.weight))
    except Exception:  # noqa: BLE001 - it is called in another way
        return False
    return seen == [6]


class _Multiplying(TorchFunctionMode):
    """While it is entered, `product` of input, weight and bias stands in the place of `linear` with one weight.

    Or with a copy of the weight in another type.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        product: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor],
    ) -> None:
        super().__init__()
        self._weights = [weight]
        self._product = product

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is functional.linear:
            x, weight, bias = (
                args[place] if len(args) > place else cast("torch.Tensor", given.get(name))
                for place, name in enumerate(("input", "weight", "bias"))
            )
            if self._is_weight(weight):
                return self._product(x, weight, bias)
        found = func(*args, **given)
        if func in (torch.Tensor.float, torch.Tensor.to, torch.Tensor.type) and self._is_weight(args[0]):
            self._weights.append(found)
        return found

    def _is_weight(self, given: Any) -> bool:
        return any(given is weight for weight in self._weights)
