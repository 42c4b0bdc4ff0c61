"""The host part of an encoder's step: whole inputs become plain arrays, and arrays come back. No torch."""

from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np

from manylora.engine.encoder_executor import EncoderExecutor
from manylora.engine.model_runner import Outcome, slots_of
from manylora.engine.sequence import Scheduled
from manylora.engine.step_input import EncoderInput
from manylora.errors import InvalidRequest
from manylora.identity import Mix

__all__ = ["EncoderRunner"]


class EncoderRunner:
    """Implements `model_runner.Runner` for a model without a cache. Lives on the engine's thread."""

    spare_block = None

    def __init__(self, executor: EncoderExecutor) -> None:
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
            Outcome(error=no_head(item.seq.mix))
            if array is None
            else Outcome(pooled=array, head=head, is_finite=bool(np.isfinite(array).all()))
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
        mixes=mixes,
    )


def no_head(mix: Mix) -> InvalidRequest:
    """What a caller is told who asks for the labels of what has none."""
    if not mix.is_plain:
        return InvalidRequest(f"{mix.label} is a mix, which has no labels of its own. Name one adapter.", param="model")
    named = f"The adapter {mix.label} has" if mix.parts else "The base model has"
    return InvalidRequest(
        f"{named} no labels. Name an adapter that was trained as a classifier (SEQ_CLS or TOKEN_CLS).", param="model"
    )
