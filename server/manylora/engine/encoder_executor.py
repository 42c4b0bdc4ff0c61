"""The device part of an encoder's step: the model runs once over whole inputs, and each becomes one array."""

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch

from manylora.engine.interface import Pooling
from manylora.engine.step_input import EncoderInput
from manylora.kernels.interface import LoraKernel, LoraPlan
from manylora.kernels.rows import Parts, group_rows
from manylora.lora.memory.device_memory import DeviceMemory
from manylora.models.encoder import EncoderModel, ragged_batch

__all__ = ["EncoderExecutor"]


class EncoderExecutor:
    """Runs steps on one device, in this process. Called on the engine's thread. The same step may be run again."""

    def __init__(self, encoder: EncoderModel, memory: DeviceMemory, kernel: LoraKernel) -> None:
        self._encoder = encoder
        self._memory = memory
        self._kernel = kernel
        self._device = memory.device

    @property
    def vocab_size(self) -> int:
        return self._encoder.vocab_size

    @torch.inference_mode()
    def forward(self, step: EncoderInput) -> list[torch.Tensor]:
        """Of each input what it was asked for: a vector [hidden]."""
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
            return [
                _pooled(states[start:end], way)
                for start, end, way in zip(starts[:-1], starts[1:], step.ways, strict=True)
            ]
        finally:
            context.batch = None
            memory.named = ()

    @staticmethod
    def arrays(found: SequenceOf[torch.Tensor]) -> list[np.ndarray]:
        """What `forward` returned, float32 on the host."""
        return [each.float().cpu().numpy() for each in found]

    def _plan(self, row_slots: np.ndarray, mixes: SequenceOf[Parts]) -> LoraPlan | None:
        memory = self._memory
        rows = group_rows(
            row_slots,
            memory.touches,
            self._device,
            inputs=memory.inputs.flags,
            outputs=memory.outputs.flags,
            mixes=mixes,
        )
        return self._kernel.plan(rows, memory) if rows is not None else None


def _pooled(states: torch.Tensor, way: Pooling) -> torch.Tensor:
    """One vector [hidden] of an input's states [n, hidden]."""
    match way:
        case "cls":
            return states[0]
        case "last":
            return states[-1]
        case "mean":
            return states.float().mean(dim=0)
