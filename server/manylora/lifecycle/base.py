"""The frozen base model as training and evaluation need it: a transformers model and its tokenizer."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manylora.errors import InvalidRequest, NotEnoughMemory
from manylora.models import checkpoint, default_model
from manylora.models.backends import DeviceName, DtypeName, select_device, select_dtype
from manylora.models.loading import resolve_model

__all__ = [
    "Base",
    "DeviceName",
    "DtypeName",
    "accepts_logits_to_keep",
    "load_base",
    "load_tokenizer",
    "memory_faults",
    "named_base",
    "quiet_peft",
]

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
    def num_embeddings(self) -> int:
        """Token ids are below it. A tokenizer can have more of them than the model."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None or pad >= self.num_embeddings else pad)


def load_base(
    model: str | None,
    *,
    name: str | None = None,
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
    max_length: int | None = None,
) -> Base:
    """Load a base with all its parameters frozen. Raises ModelUnusable when the folder holds no causal LM."""
    folder = resolve_model(model)
    place = select_device(device)
    config = checkpoint.read_config(folder)
    tokenizer, context = load_tokenizer(model)
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    loaded: Any = checkpoint.load_model(folder, config, select_dtype(dtype, place, stored))
    if place.type == "cpu" and max_length is not None and max_length <= _SHORT:
        loaded.set_attn_implementation("eager")
    loaded.requires_grad_(False)
    loaded.config.use_cache = False
    return Base(loaded.to(place), tokenizer, name or base_name(model, folder), context, stored)


def load_tokenizer(model: str | None) -> tuple[Any, int]:
    """The base's tokenizer and its context length in tokens. Raises ModelUnusable when there is none."""
    folder = resolve_model(model)
    config: Any = checkpoint.read_config(folder)
    tokenizer: Any = checkpoint.load_tokenizer(folder)
    if tokenizer.eos_token_id is None:
        raise InvalidRequest(f"The tokenizer in {folder} has no end-of-text token, so no answer could end.")
    context = int(getattr(config, "max_position_embeddings", 0) or getattr(config, "n_positions", 0) or 1024)
    return tokenizer, context


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without two warnings that no user can act on.

    PEFT asks transformers an old question on every wrap, and takes the names of labels for a setting of later versions.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"Unexpected keyword arguments \['id2label'\]", category=UserWarning)
        yield


@contextmanager
def memory_faults(advice: str) -> Iterator[None]:
    """Raises NotEnoughMemory, with what to do about it, in place of torch's own errors."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemory(f"The GPU's memory is too small for this. {advice}") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise NotEnoughMemory(f"This machine's memory is too small for this. {advice}") from error


def base_name(model: str | None, folder: Path) -> str:
    """A name fit for publishing: the default's or a Hugging Face id as it is, otherwise the folder's name."""
    if model is None:
        return default_model.NAME
    return folder.resolve().name if Path(model).exists() else model


def named_base(name: str | None) -> tuple[bool, str | None]:
    """Whether the base that an adapter's config names is on this machine, and what `load_base` calls it."""
    if not name:
        return False, None
    if Path(name).is_dir():
        return True, name
    return name.rpartition("/")[2].lower() == default_model.NAME, None


def accepts_logits_to_keep(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters
