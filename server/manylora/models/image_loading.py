"""From what the user calls a model to a frozen encoder of images in memory, with what prepares images for it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from manylora.errors import ModelUnusable
from manylora.images.picture import Pixels
from manylora.images.reading import MAX_IMAGE_RATIO, missing_packages
from manylora.lora.format.encoders import ImageModules
from manylora.models import backends, checkpoint
from manylora.models.encoder_loading import load_bare, outline
from manylora.models.loading import base_name, check_memory
from manylora.models.no_text import NoText
from manylora.models.stored_weights import StoredWeights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from manylora.settings import Settings

__all__ = ["LoadedImageModel", "image_backend", "is_image_model", "load_image_model", "offered_image_modules"]

_PROCESSOR: Final = "preprocessor_config.json"
_TOWER: Final = "_vision_model"


@dataclass(frozen=True, slots=True)
class LoadedImageModel:
    """A frozen encoder of images in eval mode on its device, without a head, and what belongs to it.

    `prepare` makes of an RGB image of Pillow's what the model sees, float32 [channels, height, width].
    """

    model: "PreTrainedModel"
    codec: NoText
    config: "PretrainedConfig"
    prepare: Callable[[Any], Pixels]
    name: str
    folder: Path
    backend: backends.Backend


def is_image_model(folder: Path) -> bool:
    """Whether a checkpoint is an encoder of images, as its config says: a type that classifies them, or a tower.

    False as well for what cannot be read, which whoever loads it says better.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    try:
        raw = checkpoint.config_json(folder)
    except ModelUnusable:
        return False
    kind = str(raw.get("model_type"))
    return "text_config" not in raw and (kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES or kind.endswith(_TOWER))


def image_backend(settings: "Settings") -> backends.Backend:
    """What computes a model of images, as the settings ask for it. Raises InvalidSettings."""
    return backends.choose_whole(settings, "models of images")


def load_image_model(settings: "Settings", folder: Path) -> LoadedImageModel:
    """Check and load the encoder of images in a folder. Raises ModelUnusable, NotEnoughMemory or InvalidSettings."""
    if missing := missing_packages():
        raise ModelUnusable(missing)
    backend = image_backend(settings)
    config = checkpoint.read_encoder_config(folder)
    dtype = backends.select_dtype(settings.dtype, backend.device, getattr(config, "dtype", None))
    check_memory(folder, dtype, backend.device)
    prepare = image_processor(folder, config)
    model = load_bare(folder, config, dtype).to(backend.device)
    model.requires_grad_(False)
    model.eval()
    return LoadedImageModel(
        model=model,
        codec=NoText(),
        config=config,
        prepare=prepare,
        name=settings.served_name or base_name(settings.model),
        folder=folder,
        backend=backend,
    )


def image_processor(folder: Path, config: "PretrainedConfig") -> Callable[[Any], Pixels]:
    """What the folder's own image processor makes of an RGB image. Raises ModelUnusable."""
    import transformers
    from PIL import Image

    from manylora.models.images import size_of

    if not (folder / _PROCESSOR).is_file():
        raise ModelUnusable(f"{folder} has no {_PROCESSOR}, which says how images are prepared. Copy it there.")
    try:
        # The one that computes with Pillow and numpy: what it gives does not depend on what else is installed.
        processor = transformers.AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, backend="pil"
        )
    except Exception as error:
        raise ModelUnusable(f"{folder / _PROCESSOR} is not usable: {error}") from error

    def prepare(image: Any) -> Pixels:
        found = processor(images=image, return_tensors="np")["pixel_values"]
        return np.ascontiguousarray(found[0], dtype=np.float32)

    wanted = size_of(config)
    for width, height in ((MAX_IMAGE_RATIO, 1), (64, 96)):
        try:
            shape = prepare(Image.new("RGB", (width, height))).shape
        except Exception as error:
            raise ModelUnusable(f"The image processor of {folder} cannot be used: {error}") from error
        if shape != wanted:
            raise ModelUnusable(
                f"{folder / _PROCESSOR} makes images of {list(shape)} numbers; the model's are {list(wanted)}, "
                "whatever was sent. Give a processor that brings every image to the model's size."
            )
    return prepare


def offered_image_modules(folder: Path) -> ImageModules:
    """What an adapter may touch of the encoder in a folder, from its headers alone. Raises ModelUnusable."""
    from manylora.models.heads import head_plans
    from manylora.models.images import image_modules
    from manylora.models.refusals import refusing

    model = outline(folder)
    prefix = str(model.base_model_prefix)
    model.eval()
    with refusing(model, "it was looked at"):
        modules = image_modules(model)
    plans = head_plans(model, StoredWeights(folder, ImageModules({}, prefix)), ("SEQ_CLS",))
    return ImageModules(modules, prefix, plans)
