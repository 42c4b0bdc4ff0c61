"""Scores of adapters' heads, from hidden states: on the device, each input by itself, in float32."""

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch.nn import functional

from manylora.engine.interface import Head
from manylora.lora.format.heads import HeadPlan
from manylora.lora.memory.device_memory import DeviceMemory
from manylora.models.heads import ACTIVATIONS

__all__ = ["Answer", "HeadReader"]

Answer: TypeAlias = tuple[torch.Tensor | None, Head | None]
"""What became of one input, and the head that gave it; None for what was asked of a head that is not there."""


class HeadReader:
    """Reads the heads that slots hold.

    `plans`: how the heads of tasks compute over the base; `sites`: where a slot has the weights of their layers.
    """

    def __init__(self, memory: DeviceMemory, plans: Mapping[str, HeadPlan], sites: Mapping[str, int]) -> None:
        self._memory = memory
        self._plans = plans
        self._sites = sites

    def of(self, slot: int) -> tuple[Head, HeadPlan] | None:
        """The head of the adapter in a slot, and how it computes; None where there is none, as of a mix."""
        head = self._memory.heads.get(slot)
        return None if head is None else (head, self._plans[head.task])

    def scores(self, slot: int, plan: HeadPlan, rows: torch.Tensor) -> torch.Tensor:
        """What a slot's head makes of one input's rows [n, hidden], in float32: [labels], or of each token [n, labels].

        Each input by itself, so that its scores do not depend on its neighbours.
        """
        rows = rows.float()
        for stage in plan.stages:
            site = self._sites[plan.site(stage)]
            scale, shift = self._memory.output(slot, site) or (None, None)
            if stage.kind == "norm":
                rows = functional.layer_norm(rows, rows.shape[-1:], scale, shift, stage.eps)
            else:
                dense = self._memory.dense(slot, site)
                assert dense is not None, "a head has a weight for each of its linears"
                matrix, factors = dense
                weight = matrix.float() if factors is None else matrix.float() * factors[:, None]
                rows = functional.linear(rows, weight, shift)
            rows = ACTIVATIONS[stage.activation](rows)
        return rows if plan.source == "every" else rows[0]
