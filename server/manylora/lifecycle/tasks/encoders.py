"""Encoders and decoders with a head or without one, as the tasks of texts load and run them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from manylora.chat.format import FormatOverrides
from manylora.lifecycle.base import Base, base_name, memory_faults
from manylora.lifecycle.data.batches import sorted_batches
from manylora.lifecycle.data.encoding import Encoded
from manylora.lifecycle.parameters import InvalidParameter
from manylora.lifecycle.tasks.interface import Source, TaskBase
from manylora.lora.format.encoders import HeadedModules
from manylora.lora.format.heads import HeadPlan
from manylora.models import checkpoint
from manylora.models.backends import select_device, select_dtype
from manylora.models.codec import HuggingFaceCodec
from manylora.models.encoder_loading import is_encoder, unreported
from manylora.models.loading import resolve_model
from manylora.models.offered import modules_of
from manylora.models.positions import UNSTATED_LIMIT, position_limit

__all__ = ["codec_of", "found_of", "frozen", "learnt_whole", "load_encoder", "load_headed", "longest", "padded"]

_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_BATCH = 16


def load_headed(source: Source, task: str, peft_task: str, labels: tuple[str, ...]) -> TaskBase:
    """The base, frozen, with a new head. Raises InvalidParameter for one that the server gives no heads of the task."""
    import transformers

    folder = resolve_model(source.model)
    offered = modules_of(source.model)
    plan = offered.heads.get(peft_task) if isinstance(offered, HeadedModules) else None
    if plan is None:
        raise InvalidParameter(f"`task` {task}: heads over this base are not served. Give another `base`.")
    read: Any = checkpoint.read_encoder_config(folder) if is_encoder(folder) else checkpoint.read_config(folder)
    read.num_labels = len(labels)
    return _loaded(source, getattr(transformers, _CLASSES[peft_task]), read, peft_task, learnt_whole(plan), labels)


def learnt_whole(plan: HeadPlan) -> tuple[str, ...]:
    """The layers of a head that the base has none of, by the names of `modules_to_save`."""
    return tuple(sorted({stage.name for stage in plan.stages if stage.weight is None}))


def load_encoder(source: Source) -> TaskBase:
    """The bare encoder, frozen, without what the vectors are not made of. Raises InvalidParameter for a decoder."""
    import transformers

    folder = resolve_model(source.model)
    if not is_encoder(folder):
        raise InvalidParameter("`task` embed takes an encoder. Give another `base`.")
    found = _loaded(
        source, transformers.AutoModel, checkpoint.read_encoder_config(folder), "FEATURE_EXTRACTION", (), ()
    )
    if getattr(found.model, "pooler", None) is not None:
        found.model.pooler = None  # no vector passes it, so that its matrices would stay as they are
    return found


def _loaded(
    source: Source, kind: Any, read: Any, peft_task: str, whole: tuple[str, ...], labels: tuple[str, ...]
) -> TaskBase:
    folder = resolve_model(source.model)
    tokenizer: Any = checkpoint.load_tokenizer(folder)
    loaded, stored = frozen(source, kind, folder, read)
    loaded.config.use_cache = False
    context = position_limit(read) or UNSTATED_LIMIT
    name = source.name or base_name(source.model, folder)
    return TaskBase(loaded, tokenizer, name, context, stored, folder, peft_task, whole, labels)


def frozen(source: Source, kind: Any, folder: Path, read: Any) -> tuple[Any, torch.dtype]:
    """A model of the class and config with the folder's weights, what they lack drawn by the seed; its stored dtype."""
    place = select_device(source.device)
    stored = read.dtype if isinstance(read.dtype, torch.dtype) else torch.float32
    torch.manual_seed(source.seed)
    with memory_faults("Choose a smaller base."), unreported():
        model, _ = checkpoint.from_folder(kind, folder, read, select_dtype(source.dtype, place, stored))
        loaded: Any = model.to(place)
    loaded.requires_grad_(False)
    return loaded, stored


def codec_of(source: Source) -> HuggingFaceCodec:
    """What makes tokens of texts and pairs as a server of the base does."""
    return HuggingFaceCodec(checkpoint.load_tokenizer(resolve_model(source.model)), (), FormatOverrides())


def longest(source: Source, max_length: int) -> int:
    """How many tokens an example may have."""
    folder = resolve_model(source.model)
    config = checkpoint.read_encoder_config(folder)
    # Two places for models that number positions from behind the padding's id.
    return min(max_length, (position_limit(config) or UNSTATED_LIMIT) - (2 if is_encoder(folder) else 0))


def padded(base: Base, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [rows, tokens], padded on the right with a token that decoders find no end of a text by."""
    pad = base.pad_id
    if base.tokenizer.pad_token_id is None:
        used = {token for row in rows for token in row}
        pad = pad if pad not in used else next(i for i in range(base.num_embeddings) if i not in used)
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    base.model.config.pad_token_id = pad  # by which a decoder's class finds each text's last token
    return ids.to(base.device), mask.to(base.device)


def found_of(model: Any, examples: Sequence[Encoded], compute: Callable[[list[Encoded]], Sequence[Any]]) -> list[Any]:
    """What `compute` finds for each example of a batch, in the order of the examples; nothing is learnt."""
    model.eval()
    found: list[Any] = [None] * len(examples)
    with torch.inference_mode():
        for indices in sorted_batches(examples, _BATCH):
            for index, each in zip(indices, compute([examples[i] for i in indices]), strict=True):
                found[index] = each
    return found
