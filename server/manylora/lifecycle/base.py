"""The frozen base model as training and evaluation need it: a transformers model and its tokenizer."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from manylora.errors import InvalidRequest, ModelUnusable

DtypeName = Literal["auto", "bfloat16", "float16", "float32"]
DeviceName = Literal["auto", "cpu", "cuda"]
_SHORT = 256  # up to here plain matmuls beat torch's fused CPU attention, measured at 48 to 128 tokens


@dataclass(frozen=True, slots=True)
class Base:
    """A loaded base. `name` is what goes into an adapter's config: never a path of this machine."""

    model: Any
    tokenizer: Any
    name: str
    context_length: int

    @property
    def device(self) -> torch.device:
        place: torch.device = next(self.model.parameters()).device
        return place

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)


def choose_device(device: DeviceName) -> torch.device:
    """Raises InvalidRequest when CUDA is asked for and missing."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest("--device cuda: this machine has no usable CUDA device.")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def choose_dtype(dtype: DtypeName, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device computes in it, and float32 elsewhere."""
    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    # torch has no public question for this; the CPU capability string is not enough, since AVX512 alone lacks it
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags or " bf16" in flags else torch.float32


def locate_base(model: str | None) -> Path:
    """The checkpoint folder of a base: a directory, a GGUF file, a Hugging Face id, or None for the default."""
    if model is not None and Path(model).is_dir():
        return Path(model)
    from manylora.models.loading import resolve_model

    return Path(resolve_model(model))


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

    folder = locate_base(model)
    tokenizer, context = load_tokenizer(model)
    place = choose_device(device)
    attention = "eager" if place.type == "cpu" and max_length is not None and max_length <= _SHORT else "sdpa"
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=choose_dtype(dtype, place),
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise ModelUnusable(f"{folder} holds no causal language model that transformers can load: {error}") from error
    loaded.requires_grad_(False)
    loaded.config.use_cache = False
    return Base(loaded.to(place), tokenizer, name or base_name(model, folder), context)


def load_tokenizer(model: str | None) -> tuple[Any, int]:
    """The base's tokenizer and its context length in tokens. Raises ModelUnusable when there is none."""
    import transformers

    folder = locate_base(model)
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
    """A name fit for publishing: a Hugging Face id as it is, otherwise the folder's name."""
    if model is not None and not Path(model).exists():
        return model
    return folder.resolve().name


def accepts_logits_to_keep(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters
