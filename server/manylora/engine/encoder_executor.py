"""The device part of an encoder's step: the model runs once over whole inputs, and each becomes one array."""

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import TypeAlias

import numpy as np
import torch
from torch.nn import functional

from manylora.engine.interface import Head, Pooling
from manylora.engine.step_input import EncoderInput
from manylora.kernels.interface import LoraKernel, LoraPlan, plan_of
from manylora.kernels.rows import Parts
from manylora.lora.format.heads import HeadPlan
from manylora.lora.memory.device_memory import DeviceMemory
from manylora.models.encoder import EncoderModel, ragged_batch
from manylora.models.heads import ACTIVATIONS

__all__ = ["EncoderExecutor"]

Answer: TypeAlias = tuple[torch.Tensor | None, Head | None]
"""What became of one input, and the head that gave it; None for what was asked of a head that is not there."""


class EncoderExecutor:
    """Runs steps on one device, in this process. Called on the engine's thread. The same step may be run again."""

    def __init__(
        self,
        encoder: EncoderModel,
        memory: DeviceMemory,
        kernel: LoraKernel,
        plans: Mapping[str, HeadPlan],
        sites: Mapping[str, int],
    ) -> None:
        self._encoder = encoder
        self._plans = plans
        self._sites = sites
        self._memory = memory
        self._kernel = kernel
        self._device = memory.device

    @property
    def vocab_size(self) -> int:
        return self._encoder.vocab_size

    @torch.inference_mode()
    def forward(self, step: EncoderInput) -> list[Answer]:
        """Of each input what it was asked for: a vector [hidden], or scores and the head that they are of."""
        memory, context = self._memory, self._encoder.wrapped.context
        lora = self._plan(np.repeat(step.slots, step.lens), step.mixes)
        starts = np.concatenate(([0], np.cumsum(step.lens)))
        batch = ragged_batch(
            torch.from_numpy(step.token_ids).to(self._device),
            step.lens,
            torch.from_numpy(starts[:-1]).to(self._device),
            lora,
            self._plan(step.slots, step.mixes),
        )
        memory.named = lora.rows.all_slots if lora is not None else ()
        try:
            states = self._encoder.states(batch)
            return self._answers(step, states, starts)
        finally:
            context.batch = None
            memory.named = ()

    @staticmethod
    def arrays(found: SequenceOf[Answer]) -> list[tuple[np.ndarray | None, Head | None]]:
        """What `forward` returned, float32 on the host."""
        return [(None if values is None else values.float().cpu().numpy(), head) for values, head in found]

    def _answers(self, step: EncoderInput, states: torch.Tensor, starts: np.ndarray) -> list[Answer]:
        heads = [
            self._memory.heads.get(int(slot)) if way == "head" else None
            for slot, way in zip(step.slots, step.ways, strict=True)
        ]
        plans = [None if head is None else self._plans[head.task] for head in heads]
        pooled = None
        if any(plan is not None and plan.source == "pooler" for plan in plans):
            pooled = self._encoder.pooled(states[torch.from_numpy(starts[:-1]).to(self._device)])
        found: list[Answer] = []
        for number, (way, head, plan) in enumerate(zip(step.ways, heads, plans, strict=True)):
            mine = states[starts[number] : starts[number + 1]]
            if way != "head":
                found.append((_pooled(mine, way), None))
            elif plan is None:
                found.append((None, None))
            else:
                rows = _read(plan, mine, None if pooled is None else pooled[number])
                found.append((self._scores(int(step.slots[number]), plan, rows), head))
        return found

    def _scores(self, slot: int, plan: HeadPlan, rows: torch.Tensor) -> torch.Tensor:
        """What a slot's head makes of one input's rows [n, hidden], in float32: [labels], or of each token [n, labels].

        Each input by itself, so that its scores do not depend on its neighbours.
        """
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

    def _plan(self, row_slots: np.ndarray, mixes: SequenceOf[Parts]) -> LoraPlan | None:
        return plan_of(self._kernel, self._memory, row_slots, mixes)


def _read(plan: HeadPlan, states: torch.Tensor, pooled: torch.Tensor | None) -> torch.Tensor:
    """What a head reads of one input's states [n, hidden]: float32 [1, hidden], or of each token [n, hidden]."""
    match plan.source:
        case "every":
            return states.float()
        case "first":
            return states[:1].float()
        case "mean":
            return states.float().mean(dim=0, keepdim=True)
        case "pooler":
            assert pooled is not None
            return pooled[None].float()


def _pooled(states: torch.Tensor, way: Pooling) -> torch.Tensor:
    """One vector [hidden] of an input's states [n, hidden]."""
    match way:
        case "cls":
            return states[0]
        case "last":
            return states[-1]
        case "mean":
            return states.float().mean(dim=0)
