"""The device part of an encoder's step, of texts or images: the model runs once, and each input becomes one array."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch

from manylora.engine.heads import Answer, HeadReader
from manylora.engine.interface import Head, Pooling
from manylora.engine.step_input import EncoderInput
from manylora.kernels.batch import Batch, ForwardContext
from manylora.kernels.interface import LoraKernel, LoraPlan, plan_of
from manylora.kernels.rows import Parts
from manylora.lora.format.heads import HeadPlan
from manylora.lora.memory.device_memory import DeviceMemory
from manylora.models.encoder import EncoderModel, ragged_batch
from manylora.models.images import ImageModel

__all__ = ["EncoderExecutor", "ImageExecutor", "WholeExecutor"]


class WholeExecutor(ABC):
    """Runs steps on one device, in this process. Called on the engine's thread. The same step may be run again."""

    def __init__(self, context: ForwardContext, memory: DeviceMemory, kernel: LoraKernel, heads: HeadReader) -> None:
        self._context = context
        self._heads = heads
        self._memory = memory
        self._kernel = kernel
        self._device = memory.device

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Ids below this may be in a step."""

    @abstractmethod
    def _states(self, step: EncoderInput, batch: Batch) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
        """Every token's state [T, hidden], and what gives the pooler's vectors [n, hidden] where a head reads them."""

    @torch.inference_mode()
    def forward(self, step: EncoderInput) -> list[Answer]:
        """Of each input what it was asked for: a vector [hidden], or scores and the head that they are of."""
        memory, context = self._memory, self._context
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
            return self._answers(step, *self._states(step, batch), starts)
        finally:
            context.batch = None
            memory.named = ()

    @staticmethod
    def arrays(found: SequenceOf[Answer]) -> list[tuple[np.ndarray | None, Head | None]]:
        """What `forward` returned, float32 on the host."""
        return [(None if values is None else values.float().cpu().numpy(), head) for values, head in found]

    def _answers(
        self, step: EncoderInput, states: torch.Tensor, pool: Callable[[], torch.Tensor], starts: np.ndarray
    ) -> list[Answer]:
        heads = [
            self._heads.of(int(slot)) if way == "head" else None
            for slot, way in zip(step.slots, step.ways, strict=True)
        ]
        pooled = None
        if any(each is not None and each[1].source == "pooler" for each in heads):
            pooled = pool()
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


class EncoderExecutor(WholeExecutor):
    """Of an encoder of texts."""

    def __init__(self, encoder: EncoderModel, memory: DeviceMemory, kernel: LoraKernel, heads: HeadReader) -> None:
        super().__init__(encoder.wrapped.context, memory, kernel, heads)
        self._encoder = encoder

    @property
    def vocab_size(self) -> int:
        return self._encoder.vocab_size

    def _states(self, step: EncoderInput, batch: Batch) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
        encoder = self._encoder
        states = encoder.states(batch, torch.from_numpy(step.types).to(self._device))
        return states, lambda: encoder.pooled(states[batch.logit_rows])


class ImageExecutor(WholeExecutor):
    """Of an encoder of images."""

    vocab_size = 1

    def __init__(self, images: ImageModel, memory: DeviceMemory, kernel: LoraKernel, heads: HeadReader) -> None:
        super().__init__(images.wrapped.context, memory, kernel, heads)
        self._images = images

    def _states(self, step: EncoderInput, batch: Batch) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
        pixels = torch.from_numpy(np.stack(step.pictures)).to(self._device, self._images.wrapped.model.dtype)
        states, pooled = self._images.states(batch, pixels)

        def vectors() -> torch.Tensor:
            assert pooled is not None, "a head reads what the model has"
            return pooled

        return states, vectors


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
        case "rest":
            return states[1:].float().mean(dim=0, keepdim=True)
        case "first_and_rest":
            return torch.cat([states[:1].float(), states[1:].float().mean(dim=0, keepdim=True)], dim=1)
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
