"""The device part of a step of a model of speech: new windows are heard, then all transcripts go on by their tokens."""

import numpy as np
import torch

from manylora.engine.executor import LocalExecutor
from manylora.engine.step_input import SoundInput, StepInput
from manylora.kernels.interface import LoraKernel
from manylora.lora.memory.device_memory import DeviceMemory
from manylora.models.kv_cache import KVCache
from manylora.models.speech import SpeechModel

__all__ = ["SpeechExecutor"]


class SpeechExecutor(LocalExecutor):
    """Runs steps on one device, in this process. What is heard goes to the same slots when a step is run again."""

    def __init__(self, speech: SpeechModel, cache: KVCache, memory: DeviceMemory, kernel: LoraKernel) -> None:
        super().__init__(speech.wrapped, cache, memory, kernel)
        self._speech = speech

    @torch.inference_mode()
    def forward(self, step: StepInput) -> torch.Tensor:
        """Logits [L, vocab] of the rows that are wanted."""
        if step.sounds:
            self._hear(step.sounds, step)
        batch = self._batch(step)
        self._memory.named = batch.lora.rows.all_slots if batch.lora is not None else ()
        try:
            return self._speech.logits(batch, list(step.heard))
        finally:
            self._memory.named = ()

    def _hear(self, sounds: tuple[SoundInput, ...], step: StepInput) -> None:
        slots = np.array([each.slot for each in sounds], dtype=np.int32)
        lora = self._plan(np.repeat(slots, self._speech.num_positions), step.mixes)
        self._memory.named = lora.rows.all_slots if lora is not None else ()
        try:
            self._speech.hear(
                [self._tensor(each.sound).to(self._wrapped.model.dtype) for each in sounds],
                [each.state_slot for each in sounds],
                lora,
            )
        finally:
            self._memory.named = ()
