"""Our linears, which stand where the model's own stood: the base's matmul once over all rows, then the deltas."""

import torch
from torch import nn

from manylora.kernels.batch import ForwardContext
from manylora.kernels.interface import LoraPlan, SiteGroup
from manylora.kernels.matmul import AddingMatmul, BaseMatmul


class AdaptedLinear(nn.Module):
    """One linear, or several that share their input, as one matmul and one low-rank call.

    `forward` takes [..., in_features] and returns [..., out_features of all members].
    """

    def __init__(
        self,
        matmul: BaseMatmul,
        group: SiteGroup,
        context: ForwardContext,
        *,
        in_features: int,
        on_logit_rows: bool = False,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = group.offsets[-1]
        self.matmul = matmul
        self.group = group
        self._context = context
        self._on_logit_rows = on_logit_rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        batch = self._context.current()
        plan: LoraPlan | None = batch.logit_lora if self._on_logit_rows else batch.lora
        if plan is None or not plan.rows.touches(self.group.sites):
            return self.matmul(rows).view(*x.shape[:-1], self.out_features)
        expected = batch.logit_rows if self._on_logit_rows else batch.token_ids
        if rows.shape[0] != expected.shape[0]:
            raise RuntimeError(f"a linear runs on {rows.shape[0]} rows in a step of {expected.shape[0]}")
        given = rows
        if plan.rows.changes_input(self.group.first):
            rows = rows.clone()
            plan.change_input_(rows, self.group)
        out = self.matmul(rows)
        plan.add_(out, rows, self.group, given)
        return out.view(*x.shape[:-1], self.out_features)

    def add_to_(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """`out` [T, out_features] += what `forward` gives for x [T, in_features], by a matmul that can add.

        Adapters that change the input or the output change this linear's own, so that it stands by itself first.
        """
        assert isinstance(self.matmul, AddingMatmul)
        plan = self._context.current().lora
        if plan is None or not plan.rows.touches(self.group.sites):
            self.matmul.add_to_(out, x)
        elif plan.rows.mixes is not None or plan.rows.changed is not None:
            out += self(x)
        else:
            self.matmul.add_to_(out, x)
            plan.add_(out, x, self.group)


class KeptLinear(AdaptedLinear):
    """A linear of the model that stays in its place, with the low-rank delta added to its output.

    For linears that compute in a way of their own, or whose weight other code reads.
    """

    def __init__(
        self, base: nn.Module, group: SiteGroup, context: ForwardContext, *, in_features: int, on_logit_rows: bool
    ) -> None:
        super().__init__(base, group, context, in_features=in_features, on_logit_rows=on_logit_rows)
        self.weight = base.weight
        self.bias = base.bias


class FusedMember(nn.Module):
    """One of several linears that share their input; the first one called computes all of them.

    The model's own code still calls q_proj, k_proj and v_proj one after the other with the same tensor.
    """

    def __init__(self, fused: "FusedLinears", member: int) -> None:
        super().__init__()
        self.fused = fused
        self.member = member
        self.in_features = fused.linear.in_features
        self.out_features = fused.widths[member]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fused.part(self.member, x)


class FusedLinears:
    """The shared computation behind a few `FusedMember`s."""

    def __init__(self, linear: AdaptedLinear, widths: tuple[int, ...]) -> None:
        self.linear = linear
        self.widths = widths
        self._input: torch.Tensor | None = None
        self._parts: list[torch.Tensor | None] = []

    def part(self, member: int, x: torch.Tensor) -> torch.Tensor:
        """A member's output for `x`. All members are computed when `x` is a tensor not seen before."""
        if self._input is not x or self._parts[member] is None:
            self._input = x
            self._parts = list(self.linear(x).split(self.widths, dim=-1))
        part = self._parts[member]
        assert part is not None
        self._parts[member] = None
        if not any(p is not None for p in self._parts):
            self._input, self._parts = None, []
        return part


class AdaptedEmbedding(nn.Module):
    """The token embedding with its low-rank delta, [1, T] ids -> [1, T, hidden]."""

    def __init__(self, base: nn.Module, site: int, context: ForwardContext, scale: float) -> None:
        super().__init__()
        assert isinstance(base.weight, torch.Tensor)
        self.base = base
        self.weight: torch.Tensor = base.weight
        width = int(base.weight.shape[1])
        self._group = SiteGroup(
            site, (0, width), torch.tensor((0, width), dtype=torch.int32, device=base.weight.device)
        )
        self._context = context
        self._scale = scale

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        batch = self._context.current()
        if batch.embeddings is not None:
            return batch.embeddings.view(*token_ids.shape, -1)
        out: torch.Tensor = self.base(token_ids)
        plan = batch.lora
        if plan is not None and plan.rows.touches(self._group.sites):
            rows = out.view(-1, out.shape[-1])
            plan.add_embedding_(rows, token_ids.view(-1), self._group, self._scale)
            if batch.own_tokens is not None:
                rows[batch.own_tokens >= 0] = 0
                plan.add_own_tokens_(rows, batch.own_tokens, self._group, self._scale)
        return out


class AdaptedNorm(nn.Module):
    """A norm whose output adapters may change: a weight of their own is the base's times a vector."""

    def __init__(self, base: nn.Module, site: int, width: int, context: ForwardContext) -> None:
        super().__init__()
        self.base = base
        assert isinstance(base.weight, torch.Tensor)
        self.weight: torch.Tensor = base.weight
        offsets = (0, width)
        self.group = SiteGroup(site, offsets, torch.tensor(offsets, dtype=torch.int32, device=base.weight.device))
        self._context = context

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x)
        batch = self._context.current()
        if batch.lora is not None and batch.lora.rows.changes_output(self.group.first):
            rows = out.view(-1, out.shape[-1])
            if rows.shape[0] != batch.token_ids.shape[0]:
                raise RuntimeError(f"a norm runs on {rows.shape[0]} rows in a step of {batch.token_ids.shape[0]}")
            batch.lora.change_output_(rows, self.group)
        return out
