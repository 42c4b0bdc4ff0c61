"""The device part of an encoder's step: the model runs once over whole inputs, and each becomes one array."""

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch

from manylora.engine.heads import Answer, HeadReader
from manylora.engine.interface import Head, Pooling
from manylora.engine.step_input import EncoderInput
from manylora.kernels.interface import LoraKernel, LoraPlan, plan_of
from manylora.kernels.rows import Parts
from manylora.lora.format.heads import HeadPlan
from manylora.lora.memory.device_memory import DeviceMemory
from manylora.models.encoder import EncoderModel, ragged_batch

__all__ = ["EncoderExecutor"]


class EncoderExecutor:
    """Runs steps on one device, in this process. Called on the engine's thread. The same step may be run again."""

    def __init__(
        self,
        encoder: EncoderModel,
        memory: DeviceMemory,
        kernel: LoraKernel,
        heads: HeadReader,
    ) -> None:
        self._encoder = encoder
        self._heads = heads
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
            states = self._encoder.states(batch, torch.from_numpy(step.types).to(self._device))
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
            self._heads.of(int(slot)) if way == "head" else None
            for slot, way in zip(step.slots, step.ways, strict=True)
        ]
        pooled = None
        if any(each is not None and each[1].source == "pooler" for each in heads):
            pooled = self._encoder.pooled(states[torch.from_numpy(starts[:-1]).to(self._device)])
        found: list[Answer] = []
        for number, (way, read) in enumerate(zip(step.ways, heads, strict=True)):
            mine = states[starts[number] : starts[number + 1]]
            if way != "head":
                found.append((_pooled(mine, way), None))
            elif read is None:
                found.append((None, None))
            else:
                head, plan = read
                rows = _read(plan, mine, None if pooled is None else pooled[number])
                found.append((self._heads.scores(int(step.slots[number]), plan, rows), head))
        return found

    def _plan(self, row_slots: np.ndarray, mixes: SequenceOf[Parts]) -> LoraPlan | None:
        return plan_of(self._kernel, self._memory, row_slots, mixes)


def _read(plan: HeadPlan, states: torch.Tensor, pooled: torch.Tensor | None) -> torch.Tensor:
    """What a head reads of one input's states [n, hidden]: float32 [1, hidden], or of each token [n, hidden]."""
    match plan.source:
        case "every":
            return states.float()
        case "first":
            return states[:1].float()
        case "last":
            return states[-1:].float()
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
