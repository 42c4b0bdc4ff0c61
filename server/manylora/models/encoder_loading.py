"""From what the user calls a model to a frozen encoder in memory, with its tokenizer."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manylora.chat.format import FormatOverrides
from manylora.errors import ModelUnusable
from manylora.lora.format.encoders import EncoderModules
from manylora.models import backends, checkpoint
from manylora.models.loading import base_name, check_memory
from manylora.models.sentence import SentenceSettings, sentence_settings
from manylora.models.stored_weights import StoredWeights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from manylora.models.codec import HuggingFaceCodec
    from manylora.settings import Settings

__all__ = [
    "LoadedEncoder",
    "encoder_backend",
    "is_encoder",
    "load_bare",
    "load_encoder",
    "offered_modules",
    "unreported",
]


@dataclass(frozen=True, slots=True)
class LoadedEncoder:
    """A frozen encoder in eval mode on its device, without a head, and what belongs to it.

    `name` is the served one; `sentence` is what a folder of sentence-transformers says of it.
    """

    model: "PreTrainedModel"
    codec: "HuggingFaceCodec"
    config: "PretrainedConfig"
    sentence: SentenceSettings
    name: str
    folder: Path
    backend: backends.Backend


def is_encoder(folder: Path) -> bool:
    """Whether a checkpoint is an encoder of texts, as its config says: a type that fills masks, and no decoder.

    False as well for what cannot be read, which whoever loads it says better.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    try:
        raw = checkpoint.config_json(folder)
    except ModelUnusable:
        return False
    classes = checkpoint.causal_class_names(str(raw.get("model_type")))
    is_stated_causal = bool(classes & {str(name) for name in raw.get("architectures") or ()})
    is_decoder = raw.get("is_decoder") is True or raw.get("is_encoder_decoder") is True or is_stated_causal
    return raw.get("model_type") in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_decoder


def encoder_backend(settings: "Settings") -> backends.Backend:
    """What computes an encoder, as the settings ask for it. Raises InvalidSettings."""
    return backends.choose_whole(settings, "encoders")


def load_encoder(settings: "Settings", folder: Path) -> LoadedEncoder:
    """Check and load the encoder in a folder. Raises ModelUnusable, NotEnoughMemory or InvalidSettings."""
    backend = encoder_backend(settings)
    config = checkpoint.read_encoder_config(folder)
    sentence = sentence_settings(folder)
    dtype = backends.select_dtype(settings.dtype, backend.device, getattr(config, "dtype", None))
    check_memory(folder, dtype, backend.device)
    tokenizer = checkpoint.load_tokenizer(folder)
    model = load_bare(folder, config, dtype).to(backend.device)
    model.requires_grad_(False)
    model.eval()
    from manylora.models.codec import HuggingFaceCodec

    return LoadedEncoder(
        model=model,
        codec=HuggingFaceCodec(tokenizer, (), FormatOverrides()),
        config=config,
        sentence=sentence,
        name=settings.served_name or base_name(settings.model),
        folder=folder,
        backend=backend,
    )


def offered_modules(folder: Path) -> EncoderModules:
    """What an adapter may touch of the encoder in a folder, from its headers alone. Raises ModelUnusable."""
    from manylora.models.heads import head_plans
    from manylora.models.modules import adaptable_modules, adaptable_norms

    model = outline(folder)
    prefix = str(model.base_model_prefix)
    plans = head_plans(model, StoredWeights(folder, EncoderModules({}, prefix)))
    return EncoderModules(adaptable_modules(model) | adaptable_norms(model), prefix, plans)


def outline(folder: Path) -> "PreTrainedModel":
    """The encoder in a folder without its weights, and without a pooler that its files lack. Raises ModelUnusable."""
    import torch
    import transformers

    config = checkpoint.read_encoder_config(folder)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = transformers.AutoModel.from_config(config)
    except (OSError, ValueError) as error:
        raise ModelUnusable(f"The config of {folder} cannot be used: {error}") from error
    prefix = str(model.base_model_prefix)
    stored = {name.removeprefix(f"{prefix}.") for name in checkpoint.stored_tensors(folder)}
    if not any(name.startswith("pooler.") for name in stored) and getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


def load_bare(folder: Path, config: "PretrainedConfig", dtype: Any) -> "PreTrainedModel":
    """The encoder on the CPU, without a head, every weight from the files. Raises ModelUnusable."""
    import transformers

    checkpoint.refuse_coded(folder, checkpoint.stored_tensors(folder))
    with unreported():
        model, info = checkpoint.from_folder(transformers.AutoModel, folder, config, dtype)
    missing = sorted(str(name) for name in info["missing_keys"])
    if missing and all(name.startswith("pooler.") for name in missing):
        model.pooler = None  # checkpoints of pretraining have none, and transformers filled it with random numbers
    elif missing:
        raise ModelUnusable(f"The weights in {folder} lack {checkpoint.some(missing)}. Fetch the checkpoint again.")
    if mismatched := sorted(str(entry[0]) for entry in info.get("mismatched_keys", ())):
        raise ModelUnusable(f"The weights in {folder} do not fit its config.json: {checkpoint.some(mismatched)}.")
    parts = {name for name, _ in model.named_children()}
    strange = [name for name in sorted(map(str, info["unexpected_keys"])) if _is_of(name, model, parts)]
    if strange:
        raise ModelUnusable(
            f"No part of {type(model).__name__} uses {checkpoint.some(strange)} of the weights in {folder}, so its "
            "answers would be others than those the checkpoint was made for. Give the original checkpoint."
        )
    return model


@contextmanager
def unreported() -> Iterator[None]:
    """Without transformers' table of tensors that are missing or left over: what matters of it is said here."""
    logger = logging.getLogger("transformers.modeling_utils")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _is_of(name: str, model: "PreTrainedModel", parts: set[str]) -> bool:
    """Whether a tensor is of the encoder itself, and not of a head that the checkpoint has as well."""
    own = name.removeprefix(f"{model.base_model_prefix}.")
    return own.partition(".")[0] in parts and not own.endswith("position_ids")
