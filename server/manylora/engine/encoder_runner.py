"""The host part of an encoder's step: whole inputs become plain arrays, and arrays come back. No torch."""

from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np

from manylora.engine.encoder_executor import WholeExecutor
from manylora.engine.model_runner import Outcome, slots_of
from manylora.engine.sequence import Scheduled
from manylora.engine.step_input import EncoderInput

__all__ = ["EncoderRunner"]


class EncoderRunner:
    """Implements `model_runner.Runner` for a model without a cache. Lives on the engine's thread."""

    spare_block = None

    def __init__(self, executor: WholeExecutor) -> None:
        self._executor = executor

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self._executor.vocab_size

    def forward(self, scheduled: SequenceOf[Scheduled]) -> Any:
        """What each input becomes, as the executor keeps it."""
        return self._executor.forward(_input(scheduled))

    def sample(self, scheduled: SequenceOf[Scheduled], found: Any) -> list[Outcome]:
        """One array for each item, or why there is none."""
        return [
            Outcome.of_whole(item, array, head)
            for item, (array, head) in zip(scheduled, self._executor.arrays(found), strict=True)
        ]


def _input(scheduled: SequenceOf[Scheduled]) -> EncoderInput:
    lens = [item.num_tokens for item in scheduled]
    assert all(item.start == 0 and item.reaches_end for item in scheduled), "an encoder's input runs whole"
    slots, mixes = slots_of(scheduled)
    return EncoderInput(
        token_ids=np.concatenate([np.array(item.seq.tokens, dtype=np.int64) for item in scheduled]),
        lens=tuple(lens),
        slots=slots,
        ways=tuple("head" if item.seq.params.reads_head else item.seq.params.pooling or "mean" for item in scheduled),
        types=np.concatenate([_types(item) for item in scheduled]),
        mixes=mixes,
        pictures=tuple(item.seq.picture.pixels for item in scheduled if item.seq.picture is not None),
    )


def _types(item: Scheduled) -> np.ndarray:
    """Of each token which text of a pair it is of."""
    found = np.zeros(item.num_tokens, dtype=np.int64)
    if item.seq.params.second_from:
        found[item.seq.params.second_from :] = 1
    return found
