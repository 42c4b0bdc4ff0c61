"""The frozen base model as training and evaluation need it: a transformers model and its tokenizer."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manylora.errors import ModelUnusable
from manylora.models import default_model
from manylora.models.loading import DeviceName, DtypeName, resolve_model, select_device, select_dtype

__all__ = ["Base", "DeviceName", "DtypeName", "accepts_logits_to_keep", "load_base", "load_tokenizer"]

_SHORT = 256  # up to here plain matmuls beat torch's fused CPU attention, measured at 48 to 128 tokens


@dataclass(frozen=True, slots=True)
class Base:
    """A loaded base. `name` is what goes into an adapter's config: never a path of this machine."""

    model: Any
    tokenizer: Any
    name: str
    context_length: int
    stored_dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        place: torch.device = next(self.model.parameters()).device
        return place

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)


def load_base(
    model: str | None,
    *,
    name: str | None = None,
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
    max_length: int | None = None,
) -> Base:
    """Load a base with all its parameters frozen. Raises ModelUnusable when the folder holds no causal LM."""
    import transformers

    folder = resolve_model(model)
    tokenizer, context = load_tokenizer(model)
    place = select_device(device)
    attention = "eager" if place.type == "cpu" and max_length is not None and max_length <= _SHORT else None
    try:
        stored_dtype = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).dtype
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=select_dtype(dtype, place, stored_dtype),
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise ModelUnusable(f"{folder} holds no causal language model that transformers can load: {error}") from error
    loaded.requires_grad_(False)
    loaded.config.use_cache = False
    stored = torch.float32 if stored_dtype is None else stored_dtype
    return Base(loaded.to(place), tokenizer, name or base_name(model, folder), context, stored)


def load_tokenizer(model: str | None) -> tuple[Any, int]:
    """The base's tokenizer and its context length in tokens. Raises ModelUnusable when there is none."""
    import transformers

    folder = resolve_model(model)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelUnusable(
            f"{folder} has no configuration and tokenizer that transformers can load: {error}"
        ) from error
    context = int(getattr(config, "max_position_embeddings", 0) or getattr(config, "n_positions", 0) or 1024)
    return tokenizer, context


def base_name(model: str | None, folder: Path) -> str:
    """A name fit for publishing: the default's or a Hugging Face id as it is, otherwise the folder's name."""
    if model is None:
        return default_model.NAME
    return folder.resolve().name if Path(model).exists() else model


def accepts_logits_to_keep(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters
