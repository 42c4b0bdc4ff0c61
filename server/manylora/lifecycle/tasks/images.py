"""Labels of images: a head over an encoder of images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from manylora.errors import InvalidImage
from manylora.images.picture import Pixels
from manylora.images.reading import missing_packages, read
from manylora.lifecycle.base import base_name
from manylora.lifecycle.data.data import Dataset
from manylora.lifecycle.data.encoding import Encoded
from manylora.lifecycle.parameters import InvalidParameter
from manylora.lifecycle.tasks.encoders import frozen, learnt_whole
from manylora.lifecycle.tasks.interface import Measured, Source, TaskBase
from manylora.lifecycle.tasks.labels import Labels, label_scores
from manylora.models import checkpoint
from manylora.models.encoder_loading import outline
from manylora.models.image_loading import image_processor, is_image_model, offered_image_modules
from manylora.models.images import num_positions
from manylora.models.loading import resolve_model

__all__ = ["Images"]

MAX_KEPT_BYTES: Final = 2**29  # of pixels that are kept from one epoch to the next; the rest is made of its file again


@dataclass(frozen=True, slots=True)
class ImageBase(TaskBase):
    """A classifier of images, which has no tokenizer."""

    @property
    def num_embeddings(self) -> int:
        """One: zeros stand for the positions of an image, where a text has token ids."""
        return 1


@dataclass(frozen=True, slots=True)
class Pictured(Encoded):
    """An image: `prepare` makes of `data`, its file, float32 [channels, height, width], which `kept` are."""

    data: bytes = b""
    prepare: Callable[[Any], Pixels] | None = None
    kept: Pixels | None = None

    def pixels(self) -> torch.Tensor:
        assert self.prepare is not None, "the task encoded it"
        return torch.from_numpy(self.prepare(read(self.data)) if self.kept is None else self.kept)


class Images:
    """A label for each image. Implements `interface.Task`."""

    unit: Final = "label"
    lower: Final = frozenset[str]()

    def labels(self, dataset: Dataset) -> tuple[str, ...]:
        return dataset.labels

    def load(self, source: Source, labels: tuple[str, ...]) -> TaskBase:
        """PEFT has no task of images: an adapter says none, as the server takes it."""
        import transformers

        folder = _folder(source)
        plan = offered_image_modules(folder).heads.get("SEQ_CLS")
        if plan is None:
            raise InvalidParameter("`task` image: heads over this base are not served. Give another `base`.")
        config: Any = checkpoint.read_encoder_config(folder)
        config.num_labels = len(labels)
        model, stored = frozen(source, transformers.AutoModelForImageClassification, folder, config)
        name = source.name or base_name(source.model, folder)
        return ImageBase(model, None, name, 0, stored, folder, None, learnt_whole(plan), labels)

    def encode(self, dataset: Dataset, source: Source, max_length: int) -> list[Encoded]:
        """Each file is read once now, so that none can fail later."""
        folder = _folder(source)
        prepare = image_processor(folder, checkpoint.read_encoder_config(folder))
        count = num_positions(outline(folder).eval())
        is_answer = (*[False] * (count - 1), True)
        found: list[Encoded] = []
        room = MAX_KEPT_BYTES
        for example in dataset.examples:
            data = dataset.file_of(example)
            try:
                pixels = prepare(read(data))
            except InvalidImage as error:
                raise InvalidParameter(f"`data`: row {example.row}: {error.message}") from error
            room -= pixels.nbytes
            kept = pixels if room >= 0 else None
            found.append(Pictured(example, (0,) * count, is_answer, data=data, prepare=prepare, kept=kept))
        return found

    def objective(self, model: Any, base: TaskBase) -> Labels:
        return Labels(model, base, _logits)

    def measured(self, model: Any, base: TaskBase, examples: Sequence[Encoded]) -> Measured:
        return label_scores(model, base, examples, _logits)


def _folder(source: Source) -> Path:
    if missing := missing_packages():
        raise InvalidParameter(f"`task` image: {missing}")
    folder = resolve_model(source.model)
    if source.model is None or not is_image_model(folder):
        raise InvalidParameter("`task` image takes an encoder of images, such as a ViT: give its folder as `base`.")
    return folder


def _logits(model: Any, base: TaskBase, examples: Sequence[Encoded]) -> tuple[torch.Tensor, int]:
    """Logits [images, labels], and how many positions they took."""
    pixels = torch.stack([each.pixels() for each in examples if isinstance(each, Pictured)])
    given = pixels.to(base.device, base.model.dtype)
    return model(pixel_values=given).logits, sum(len(each) for each in examples)
