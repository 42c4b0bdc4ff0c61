"""What a training needs of memory at the least, so that one which surely does not fit is refused before its first step.

A lower bound: what every step holds at once. A training that passes may need more; one that is refused cannot run.
"""

from collections.abc import Sequence
from typing import Any, Final

from manylora.errors import NotEnoughMemory
from manylora.lifecycle.base import Base
from manylora.lifecycle.data.batches import epoch_order
from manylora.lifecycle.data.encoding import Encoded
from manylora.lifecycle.progress import Listener, Progress
from manylora.lifecycle.train.config import Schedule
from manylora.models.backends import free_bytes, total_bytes

__all__ = ["check_memory", "least_bytes"]

_OF_A_PARAMETER: Final = 12  # bytes: its gradient and AdamW's two means, in float32
_OF_A_LOGIT: Final = 8  # as float32, and its gradient
_GB: Final = 1e9


def least_bytes(base: Base, examples: Sequence[Encoded], schedule: Schedule, num_parameters: int) -> int:
    """Beside the base and the matrices themselves, for the largest batch of the first epoch."""
    config: Any = base.model.config.get_text_config()
    lengths = [example.num_tokens for example in examples]
    batches = epoch_order([len(e) for e in examples], schedule.batch_size, seed=schedule.seed, epoch=0)
    most = max(sum(lengths[i] for i in batch) for batch in batches)
    answers = max(sum(_answer_tokens(examples[i]) for i in batch) for batch in batches)
    num_logits = int(getattr(config, "vocab_size", 0))  # models of images have no vocabulary
    kept: int = config.num_hidden_layers * config.hidden_size * base.model.dtype.itemsize  # each layer's input
    return num_parameters * _OF_A_PARAMETER + most * kept + answers * num_logits * _OF_A_LOGIT


def _answer_tokens(example: Encoded) -> int:
    return example.num_answer_tokens + (0 if example.rejected is None else example.rejected.num_answer_tokens)


def check_memory(
    base: Base, examples: Sequence[Encoded], schedule: Schedule, num_parameters: int, advice: str, listen: Listener
) -> None:
    """Raises NotEnoughMemory where the machine, or the device, has too little; warns where too little of it is free."""
    needed, kind = least_bytes(base, examples, schedule, num_parameters), base.device.type
    has, free = total_bytes(base.device), free_bytes(base.device)
    said = f"This training needs at least {needed / _GB:.1f} GB beside the base"
    if needed > has:
        raise NotEnoughMemory(f"{said}, and the {kind} has {has / _GB:.1f} GB. {advice}")
    if needed > free:
        message = (
            f"{said}, and {free / _GB:.1f} GB are free on the {kind}: it may be ended for want of memory. {advice}"
        )
        listen(Progress("warning", message=message))
