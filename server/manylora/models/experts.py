"""Mixtures of experts: the experts' fused weights and the router as modules that adapters may touch.

Transformers keeps the experts of a layer in one parameter, [experts, out, in], and computes them behind one interface
(`use_experts_implementation`): each token's rows go through the experts that the router has chosen for it. Here rows
are grouped by expert, and each that is chosen is one product over its rows, by the matmul that the backend has for
them; where it has none, a step in which no adapter touches them runs the model's own code.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, cast

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from manylora.kernels.batch import ForwardContext
from manylora.kernels.interface import LoraPlan, SiteGroup
from manylora.kernels.matmul import BaseMatmul, MatmulFactory
from manylora.lora.format.spec import ModuleSpec

__all__ = [
    "AdaptedExperts",
    "AdaptedRouter",
    "InterfaceHolder",
    "RoutedExperts",
    "StackedLinear",
    "agree",
    "is_router_served",
    "plan_of",
    "spec_of",
]

_MARKS = ("num_experts", "has_gate", "is_transposed", "has_bias", "has_post_expert_norm")


@dataclass(frozen=True)
class InterfaceHolder:
    """A module that holds a layer's experts behind transformers' interface, in an untouched model."""

    path: str
    base: Any

    @classmethod
    def of(cls, path: str, module: nn.Module, _owner: nn.Module) -> Self | None:
        names = {name for name, _ in module.named_parameters(recurse=False)}
        if all(hasattr(module, mark) for mark in _MARKS) and {_first(module), "down_proj"} <= names:
            return cls(path, module)
        return None

    @property
    def num_experts(self) -> int:
        return int(self.base.num_experts)

    def specs(self) -> Iterator[ModuleSpec]:
        """The parameters that adapters may touch, in the order in which the module has them."""
        for name, weight in self.base.named_parameters(recurse=False):
            if name in (_first(self.base), "down_proj"):
                yield spec_of(f"{self.path}.{name}", weight, is_turned=self.base.is_transposed)

    def replacement(self, sites: Mapping[str, int], context: ForwardContext) -> "AdaptedExperts":
        return AdaptedExperts(self.base, sites, context)

    def agrees(self, tolerance: float) -> bool:
        """Whether the base's own code computes the same of random rows, within a share of their size."""
        base, ours = self.base, self.replacement({}, ForwardContext())
        weight = getattr(base, _first(base))
        random = torch.Generator().manual_seed(0)
        hidden = torch.randn(6, next(self.specs()).in_features, generator=random)
        chosen = torch.stack([torch.randperm(base.num_experts, generator=random)[:2] for _ in hidden])
        weights = torch.rand(chosen.shape, generator=random)
        given = (hidden.to(weight), chosen.to(weight.device), weights.to(weight))
        return agree(lambda: base(*given), lambda: ours.compute(*given, None), tolerance)


def spec_of(path: str, weight: torch.Tensor, *, is_turned: bool, is_swapped: bool = False) -> ModuleSpec:
    """Of one parameter of experts, [experts, out, in] or with `is_turned` [experts, in, out]."""
    count, one, other = weight.shape
    inside, outside = (one, other) if is_turned else (other, one)
    return ModuleSpec(path, "experts", inside, outside, is_parameter=True, num_experts=count, has_swapped_ab=is_swapped)


def _first(experts: Any) -> str:
    """The name of the weight that the experts' input is multiplied by."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


class StackedLinear:
    """One parameter of a layer's experts, [experts, out, in] or with `is_turned` [experts, in, out]: a product for each
    expert over its own rows, with low-rank deltas.

    `biases`: the name of the parameter that has them, [experts, out]. `site`: None where no adapter may touch it.
    """

    def __init__(
        self, base: nn.Module, name: str, site: int | None, *, is_turned: bool = False, biases: str | None = None
    ) -> None:
        self.site = site
        self._base = base
        self._name = name
        self._is_turned = is_turned
        self._biases = biases
        self._products: list[BaseMatmul] | None = None

    @property
    def is_taken_over(self) -> bool:
        return self._products is not None

    def take_over(self, make: MatmulFactory) -> None:
        """Bring each expert's weights into the form that a backend multiplies by, and leave out the model's own."""
        self._products = [
            make(weight.detach(), None if bias is None else bias.detach()) for weight, bias in self._each()
        ]
        setattr(self._base, self._name, None)

    def multiplied(self, x: torch.Tensor, rows: torch.Tensor, bounds: list[int], plan: LoraPlan | None) -> torch.Tensor:
        """[P, out] of [P, in], which stand in the order of their experts; the last of each ends at `bounds`.

        `rows` int64 [P]: the row of the step of each, by which a plan's adapters are found.
        """
        products = self._products or [partial(functional.linear, weight=w, bias=bias) for w, bias in self._each()]
        ends = zip(products, (0, *bounds), bounds, strict=False)
        out = torch.cat([product(x[begin:end]) for product, begin, end in ends if begin < end])
        if plan is not None and self.site is not None and plan.rows.touches((self.site,)):
            plan.add_experts_(out, x, rows, bounds, self.site)
        return out

    def _each(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Each expert's weight [out, in] and bias."""
        weights = getattr(self._base, self._name)
        biases = [None] * len(weights) if self._biases is None else getattr(self._base, self._biases)
        for weight, bias in zip(weights, biases, strict=True):
            yield weight.T if self._is_turned else weight, bias


class RoutedExperts(nn.Module):
    """A layer's experts, of which a router has chosen some for each row, around the base's own module.

    A subclass sets the two products that an expert is made of, and computes with them.
    """

    _first: StackedLinear
    _last: StackedLinear

    def __init__(self, base: Any, context: ForwardContext) -> None:
        super().__init__()
        self.base = base
        self._context = context

    def take_over(self, make: MatmulFactory) -> None:
        """Multiply by what a backend makes of the weights."""
        for each in (self._first, self._last):
            each.take_over(make)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, hidden] of [T, hidden], the numbers of the experts chosen and their weights, [T, k] each."""
        plan = plan_of(self._context, (self._first, self._last), hidden_states.shape[0])
        if plan is None and not self._first.is_taken_over:
            own: torch.Tensor = self.base(hidden_states, top_k_index, top_k_weights)
            return own
        return self.compute(hidden_states, top_k_index, top_k_weights, plan)

    def compute(
        self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, plan: LoraPlan | None
    ) -> torch.Tensor:
        """What the experts compute, expert by expert, with the deltas of a plan's adapters or with none."""
        raise NotImplementedError


class AdaptedExperts(RoutedExperts):
    """A layer's experts behind transformers' interface, with low-rank deltas on what each of them multiplies by."""

    def __init__(self, base: Any, sites: Mapping[str, int], context: ForwardContext) -> None:
        super().__init__(base, context)
        self._first, self._last = (
            StackedLinear(
                base,
                name,
                sites.get(name),
                is_turned=base.is_transposed,
                biases=f"{name}_bias" if base.has_bias else None,
            )
            for name in (_first(base), "down_proj")
        )

    def compute(
        self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, plan: LoraPlan | None
    ) -> torch.Tensor:
        """What the experts compute, expert by expert, with the deltas of a plan's adapters or with none."""
        base, (count, most) = self.base, chosen.shape
        experts, order = torch.sort(chosen.reshape(-1), stable=True)
        rows = order // most
        bounds = torch.bincount(experts, minlength=base.num_experts).cumsum(0).tolist()
        inner = self._first.multiplied(hidden[rows], rows, bounds, plan)
        inner = base._apply_gate(inner) if base.has_gate else base.act_fn(inner)
        found = self._last.multiplied(inner, rows, bounds, plan)
        if base.has_post_expert_norm:
            found = base.post_expert_norm(found)
        found = found * weights.reshape(-1)[order, None]
        in_order = torch.empty_like(found)
        in_order[order] = found
        return in_order.view(count, most, -1).sum(dim=1).to(hidden.dtype)


def plan_of(context: ForwardContext, parts: Iterable[StackedLinear], num_rows: int | None = None) -> LoraPlan | None:
    """The step's deltas where they touch one of these; None where they do not.

    `num_rows`: how many the experts are given, which have to be those of the step; None where they have been chosen.
    """
    batch = context.current()
    sites = [part.site for part in parts if part.site is not None]
    if batch.lora is None or not batch.lora.rows.touches(sites):
        return None
    if num_rows is not None and num_rows != batch.token_ids.shape[0]:
        raise RuntimeError(f"experts run on {num_rows} rows in a step of {batch.token_ids.shape[0]}")
    return batch.lora


def agree(wanted: Callable[[], torch.Tensor], found: Callable[[], torch.Tensor], tolerance: float) -> bool:
    """Whether two ways of computing come to the same, within a share of its size."""
    try:
        one, other = wanted().float(), found().float()
    except Exception:  # noqa: BLE001 - it is called in another way
        return False
    return bool((other - one).square().mean().sqrt() <= tolerance * one.square().mean().sqrt())


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


def is_router_served(router: nn.Module, width: int, num_experts: int) -> bool:
    """Whether a router multiplies its weight once with all rows of a step [T, width], by `linear`.

    It is called with the rows alone or, beside them, with what is added to the scores to choose by, [num_experts].
    """
    assert isinstance(router.weight, torch.Tensor)
    rows, added = torch.zeros(6, width).to(router.weight), torch.zeros(num_experts).to(router.weight)
    return any(_multiplies_once(router, given) for given in ((rows,), (rows, added)))


def _multiplies_once(router: nn.Module, given: tuple[torch.Tensor, ...]) -> bool:
    seen: list[int] = []

    def note(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        seen.append(x.numel() // x.shape[-1])
        return functional.linear(x, weight, bias)

    assert isinstance(router.weight, torch.Tensor)
    try:
        with _Multiplying(router.weight, note):
            router(*given)
    except Exception:  # noqa: BLE001 - it is called in another way
        return False
    return seen == [given[0].shape[0]]


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
