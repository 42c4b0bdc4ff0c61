"""Experts that a model computes in a way of its own, as modules that adapters may touch.

Llama 4's, LongCat Flash's and JetMoE's. They are found by what they hold, not by a name.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Self

import torch
from torch import nn

from manylora.kernels.batch import ForwardContext
from manylora.kernels.interface import LoraPlan
from manylora.kernels.matmul import MatmulFactory
from manylora.lora.format.spec import ModuleSpec
from manylora.models.experts import RoutedExperts, StackedLinear, agree, plan_of, spec_of

__all__ = ["BatchedHolder", "IdleHolder", "OwnExperts", "ParallelHolder"]

_FUSED = ("gate_up_proj", "down_proj")
_NUM_ROWS = 6  # of the input that the two ways of computing are compared with


def _own_parameters(module: nn.Module) -> dict[str, int]:
    """The number of dimensions of each."""
    return {name: weight.dim() for name, weight in module.named_parameters(recurse=False)}


@dataclass(frozen=True)
class BatchedHolder:
    """Llama 4: weights [experts, in, out]. A token's row comes once for each expert, as zeros where it was not chosen.

    PEFT takes the weights for [experts, out, in], as nothing tells it otherwise: its A is on the side of the output.
    """

    path: str
    base: Any

    @classmethod
    def of(cls, path: str, module: nn.Module, _owner: nn.Module) -> Self | None:
        is_one = _own_parameters(module) == dict.fromkeys(_FUSED, 3) and not hasattr(module, "is_transposed")
        return cls(path, module) if is_one and not hasattr(module, "zero_expert_num") else None

    @property
    def num_experts(self) -> int:
        return int(self.base.gate_up_proj.shape[0])

    def specs(self) -> Iterator[ModuleSpec]:
        """The parameters that adapters may touch, in the order in which the module has them."""
        for name in _FUSED:
            yield spec_of(f"{self.path}.{name}", getattr(self.base, name), is_turned=True, is_swapped=True)

    def replacement(self, sites: Mapping[str, int], context: ForwardContext) -> "BatchedExperts":
        return BatchedExperts(self.base, sites, context)

    def agrees(self, tolerance: float) -> bool:
        """Whether the base's own code computes the same of random rows, within a share of their size."""
        ours, weight = self.replacement({}, ForwardContext()), self.base.gate_up_proj
        random = torch.Generator().manual_seed(0)
        hidden = torch.randn(self.num_experts, _NUM_ROWS, weight.shape[1], generator=random)
        hidden *= torch.rand(self.num_experts, _NUM_ROWS, 1, generator=random) > 0.5
        given = hidden.view(-1, weight.shape[1]).to(weight)
        return agree(lambda: self.base(given), lambda: ours.compute(given, None), tolerance)


class BatchedExperts(nn.Module):
    """Llama 4's experts, of which only the rows that a router chose are multiplied: zeros come out as zeros."""

    def __init__(self, base: Any, sites: Mapping[str, int], context: ForwardContext) -> None:
        super().__init__()
        self.base = base
        self._context = context
        self._num_experts = int(base.gate_up_proj.shape[0])
        self._first, self._last = (StackedLinear(base, name, sites.get(name), is_turned=True) for name in _FUSED)

    def take_over(self, make: MatmulFactory) -> None:
        """Multiply by what a backend makes of the weights."""
        for each in (self._first, self._last):
            each.take_over(make)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[experts * T, hidden] of as many: the rows of the step for the first expert, then for the next."""
        plan = plan_of(self._context, (self._first, self._last), hidden_states.shape[0] // self._num_experts)
        if plan is None and not self._first.is_taken_over:
            own: torch.Tensor = self.base(hidden_states)
            return own
        return self.compute(hidden_states, plan)

    def compute(self, hidden: torch.Tensor, plan: LoraPlan | None) -> torch.Tensor:
        """What all experts compute, with the deltas of a plan's adapters or with none."""
        is_chosen = (hidden != 0).any(dim=1)
        places, out = is_chosen.nonzero().flatten(), torch.zeros_like(hidden)
        if not len(places):
            return out
        rows = places % (hidden.shape[0] // self._num_experts)
        bounds = is_chosen.view(self._num_experts, -1).sum(dim=1).cumsum(0).tolist()
        gate, up = self._first.multiplied(hidden[places], rows, bounds, plan).chunk(2, dim=-1)
        out[places] = self._last.multiplied(up * self.base.act_fn(gate), rows, bounds, plan)
        return out


@dataclass(frozen=True)
class IdleHolder:
    """LongCat Flash: weights [experts, out, in], and experts behind them that give back what they are given.

    The first weight has unused numbers for these too, as has an adapter's.
    """

    path: str
    base: Any

    @classmethod
    def of(cls, path: str, module: nn.Module, _owner: nn.Module) -> Self | None:
        is_one = _own_parameters(module) == dict.fromkeys(_FUSED, 3) and hasattr(module, "zero_expert_num")
        return cls(path, module) if is_one else None

    @property
    def num_experts(self) -> int:
        return int(self.base.gate_up_proj.shape[0])

    def specs(self) -> Iterator[ModuleSpec]:
        """The parameters that adapters may touch, in the order in which the module has them."""
        for name in _FUSED:
            yield spec_of(f"{self.path}.{name}", getattr(self.base, name), is_turned=False)

    def replacement(self, sites: Mapping[str, int], context: ForwardContext) -> "ExpertsWithIdle":
        return ExpertsWithIdle(self.base, sites, context)

    def agrees(self, tolerance: float) -> bool:
        """Whether the base's own code computes the same of random rows, within a share of their size."""
        ours, weight = self.replacement({}, ForwardContext()), self.base.gate_up_proj
        random = torch.Generator().manual_seed(0)
        hidden = torch.randn(_NUM_ROWS, weight.shape[2], generator=random).to(weight)
        chosen = torch.stack([torch.randperm(self.num_experts, generator=random)[:2] for _ in hidden])
        weights = torch.rand(chosen.shape, generator=random).to(weight)
        given = (hidden, chosen.to(weight.device), weights)
        return agree(lambda: self.base(*given), lambda: ours.compute(*given, None), tolerance)


class ExpertsWithIdle(RoutedExperts):
    """LongCat Flash's experts, with low-rank deltas on what each of them multiplies by."""

    def __init__(self, base: Any, sites: Mapping[str, int], context: ForwardContext) -> None:
        super().__init__(base, context)
        self._num_all, self._num_busy = int(base.gate_up_proj.shape[0]), int(base.down_proj.shape[0])
        self._first, self._last = (StackedLinear(base, name, sites.get(name)) for name in _FUSED)

    def compute(
        self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, plan: LoraPlan | None
    ) -> torch.Tensor:
        """What the experts compute, expert by expert, with the deltas of a plan's adapters or with none."""
        count, most = chosen.shape
        experts, order = torch.sort(chosen.reshape(-1), stable=True)
        rows = order // most
        found = hidden[rows]
        bounds = torch.bincount(experts, minlength=self._num_all).cumsum(0)[: self._num_busy].tolist()
        end = bounds[-1]
        if end:
            all_bounds = bounds + [end] * (self._num_all - self._num_busy)
            gate, up = self._first.multiplied(found[:end], rows[:end], all_bounds, plan).chunk(2, dim=-1)
            found[:end] = self._last.multiplied(self.base.act_fn(gate) * up, rows[:end], bounds, plan)
        in_order = torch.empty_like(found)
        in_order[order] = (found * weights.reshape(-1)[order, None]).to(found.dtype)
        return in_order.view(count, most, -1).sum(dim=1).to(hidden.dtype)


@dataclass(frozen=True)
class ParallelHolder:
    """JetMoE: one weight [experts, out, in] a module, called with rows in the order of their experts, whose number is
    given. Whose rows these are, the router beside it knows.
    """

    path: str
    base: Any
    router: Any

    @classmethod
    def of(cls, path: str, module: nn.Module, owner: nn.Module) -> Self | None:
        router = getattr(owner, "router", None)
        is_one = _own_parameters(module) == {"weight": 3} and hasattr(module, "num_experts") and router is not None
        return cls(path, module, router) if is_one else None

    @property
    def num_experts(self) -> int:
        return int(self.base.weight.shape[0])

    def specs(self) -> Iterator[ModuleSpec]:
        """The one parameter, which adapters may touch."""
        yield spec_of(f"{self.path}.weight", self.base.weight, is_turned=False)

    def replacement(self, sites: Mapping[str, int], context: ForwardContext) -> "ParallelExperts":
        ours = ParallelExperts(self.base, sites.get("weight"), context)
        self.router.register_forward_hook(ours.note)
        return ours

    def agrees(self, tolerance: float) -> bool:
        """Whether the base's own code computes the same of random rows, and the router says whose they are."""
        weight, random = self.base.weight, torch.Generator().manual_seed(0)
        ours = ParallelExperts(self.base, None, ForwardContext())
        try:
            tokens = torch.randn(_NUM_ROWS, self.router.input_size, generator=random).to(weight)
            said = self.router(tokens)
            ours.note(self.router, (), said)
            sizes = said[3]
            is_told = len(sizes) == self.num_experts and sum(sizes) == len(said[1]) and int(said[1].max()) < _NUM_ROWS
        except Exception:  # noqa: BLE001 - it is called in another way
            return False
        given = torch.randn(sum(sizes), weight.shape[2], generator=random).to(weight)
        return is_told and agree(lambda: self.base(given, sizes), lambda: ours.compute(given, sizes, None), tolerance)


class ParallelExperts(nn.Module):
    """One weight of JetMoE's experts, with low-rank deltas."""

    def __init__(self, base: Any, site: int | None, context: ForwardContext) -> None:
        super().__init__()
        self.base = base
        self._context = context
        self._linear = StackedLinear(base, "weight", site)
        self._rows = torch.zeros(0, dtype=torch.int64)

    def note(self, _router: nn.Module, _given: Any, said: Sequence[Any]) -> None:
        """Keep whose rows come next. `said`: their order, the row of each, its weight, each expert's number, logits."""
        self._rows = said[1]

    def take_over(self, make: MatmulFactory) -> None:
        """Multiply by what a backend makes of the weight."""
        self._linear.take_over(make)

    def forward(self, inputs: torch.Tensor, expert_size: list[int]) -> torch.Tensor:
        """[P, out] of [P, in], of which as many rows as `expert_size` says are of each expert."""
        plan = plan_of(self._context, (self._linear,))
        if plan is None and not self._linear.is_taken_over:
            own: torch.Tensor = self.base(inputs, expert_size)
            return own
        return self.compute(inputs, expert_size, plan)

    def compute(self, inputs: torch.Tensor, sizes: list[int], plan: LoraPlan | None) -> torch.Tensor:
        """What the experts compute, each of its own rows, with the deltas of a plan's adapters or with none."""
        return self._linear.multiplied(inputs, self._rows, list(accumulate(sizes)), plan)


OwnExperts = BatchedExperts | ExpertsWithIdle | ParallelExperts
