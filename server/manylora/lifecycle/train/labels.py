"""Training of classifiers: a head of the rows' labels over an encoder or a decoder, and its scores on held-out rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from manylora.lifecycle.base import Base, base_name, memory_faults
from manylora.lifecycle.data.batches import sorted_batches
from manylora.lifecycle.data.data import Dataset
from manylora.lifecycle.data.encoding import Encoded
from manylora.lifecycle.parameters import InvalidParameter
from manylora.lifecycle.train.config import TrainConfig
from manylora.lifecycle.train.objectives import Summed
from manylora.lora.format.encoders import HeadedModules
from manylora.lora.format.heads import HeadPlan
from manylora.models import checkpoint
from manylora.models.backends import select_device, select_dtype
from manylora.models.encoder_loading import is_encoder, unreported
from manylora.models.loading import resolve_model
from manylora.models.offered import modules_of
from manylora.models.positions import UNSTATED_LIMIT, position_limit

__all__ = ["ClassifierBase", "Labels", "TextEncoder", "load_classifier", "lora_fields", "scores"]

_TASK = "SEQ_CLS"


@dataclass(frozen=True, slots=True)
class ClassifierBase(Base):
    """A base with a head of `labels` that is yet to be learnt; `plan`: how the server will compute it."""

    labels: tuple[str, ...]
    plan: HeadPlan


class TextEncoder:
    """Makes tokens of texts as the server does for `/v1/classify`. A text that is too long is cut at its end."""

    def __init__(self, model: str | None, *, max_length: int) -> None:
        folder = resolve_model(model)
        self._tokenizer: Any = checkpoint.load_tokenizer(folder)
        config = checkpoint.read_encoder_config(folder)
        # Two places for models that number positions from behind the padding's id.
        room = (position_limit(config) or UNSTATED_LIMIT) - (2 if is_encoder(folder) else 0)
        self._most = min(max_length, room)

    def encode(self, dataset: Dataset) -> list[Encoded]:
        """Every text of a dataset of labels. Raises InvalidParameter for one without tokens."""
        return [self._encoded(example) for example in dataset.examples]

    def _encoded(self, example: Any) -> Encoded:
        text = example.messages[0].content
        ids = self._tokenizer(text)["input_ids"]
        kept = self._tokenizer(text, truncation=True, max_length=self._most)["input_ids"]
        if not kept:
            raise InvalidParameter(f"`data`: row {example.row} has no tokens for this base.")
        return Encoded(example, tuple(kept), (*[False] * (len(kept) - 1), True), num_cut=len(ids) - len(kept))


def load_classifier(config: TrainConfig, labels: tuple[str, ...]) -> ClassifierBase:
    """The base, frozen, with a new head. Raises InvalidParameter for one that the server gives no heads."""
    from transformers import AutoModelForSequenceClassification

    folder = resolve_model(config.base)
    offered = modules_of(config.base)
    plan = offered.heads.get(_TASK) if isinstance(offered, HeadedModules) else None
    if plan is None:
        raise InvalidParameter("`task` classify: heads over this base are not served. Give another `base`.")
    place = select_device(config.device)
    read: Any = checkpoint.read_encoder_config(folder) if is_encoder(folder) else checkpoint.read_config(folder)
    read.num_labels = len(labels)
    tokenizer: Any = checkpoint.load_tokenizer(folder)
    stored = read.dtype if isinstance(read.dtype, torch.dtype) else torch.float32
    torch.manual_seed(config.schedule.seed)
    with memory_faults("Choose a smaller base."), unreported():
        model, _ = checkpoint.from_folder(
            AutoModelForSequenceClassification, folder, read, select_dtype(config.dtype, place, stored)
        )
        loaded: Any = model.to(place)
    loaded.requires_grad_(False)
    loaded.config.use_cache = False
    context = position_limit(read) or UNSTATED_LIMIT
    name = config.base_name or base_name(config.base, folder)
    return ClassifierBase(loaded, tokenizer, name, context, stored, labels, plan)


def lora_fields(base: ClassifierBase) -> Mapping[str, Any]:
    """Of PEFT's config: the task, and which layers of the head are learnt whole, those that the base has none of."""
    new = {stage.name for stage in base.plan.stages if stage.weight is None}
    return {"task_type": _TASK, "modules_to_save": sorted(new)}


class Labels:
    """Implements `objectives.Objective`: mean negative log-likelihood of a text's label, in nats."""

    def __init__(self, model: Any, base: ClassifierBase) -> None:
        self._model = model
        self._base = base
        self._numbers = {label: number for number, label in enumerate(base.labels)}

    def weight(self, _example: Encoded) -> int:
        return 1

    def summed(self, examples: Sequence[Encoded]) -> Summed:
        logits, num_tokens = _logits(self._model, self._base, examples)
        numbers = [self._numbers[str(each.example.label)] for each in examples]
        wanted = torch.tensor(numbers, device=self._base.device)
        return Summed(functional.cross_entropy(logits.float(), wanted, reduction="sum"), num_tokens)


def scores(model: Any, base: ClassifierBase, examples: Sequence[Encoded]) -> dict[str, Any]:
    """Accuracy, the mean of the labels' F1, each label's own, and how often each was taken for each."""
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

    model.eval()
    found = [0] * len(examples)
    with torch.inference_mode():
        for indices in sorted_batches(examples, 16):
            logits, _ = _logits(model, base, [examples[i] for i in indices])
            for index, number in zip(indices, logits.argmax(-1).tolist(), strict=True):
                found[index] = number
    wanted = [base.labels.index(str(each.example.label)) for each in examples]
    numbers = list(range(len(base.labels)))
    each = f1_score(wanted, found, labels=numbers, average=None, zero_division=0.0)
    return {
        "num_examples": len(examples),
        "accuracy": float(accuracy_score(wanted, found)),
        "macro_f1": float(each.mean()),
        "f1": dict(zip(base.labels, map(float, each), strict=True)),
        "confusion": confusion_matrix(wanted, found, labels=numbers).tolist(),
    }


def _logits(model: Any, base: Base, examples: Sequence[Encoded]) -> tuple[torch.Tensor, int]:
    """Logits [texts, labels], and how many tokens they took. Padded on the right."""
    used = {token for each in examples for token in each.ids}
    pad = base.pad_id
    if pad in used and base.tokenizer.pad_token_id is None:
        pad = next(number for number in range(base.num_embeddings) if number not in used)
    length = max(len(each) for each in examples)
    ids = torch.full((len(examples), length), pad)
    mask = torch.zeros((len(examples), length), dtype=torch.long)
    for row, each in enumerate(examples):
        ids[row, : len(each)] = torch.tensor(each.ids)
        mask[row, : len(each)] = 1
    base.model.config.pad_token_id = pad  # by which a decoder's class finds each text's last token
    found = model(input_ids=ids.to(base.device), attention_mask=mask.to(base.device))
    return found.logits, int(mask.sum())
