"""GGUF files become Hugging Face folders: dequantised once, kept as bfloat16 safetensors."""

import re
import struct
from pathlib import Path
from typing import Any

from manylora.errors import ModelUnusable
from manylora.models.model_cache import ModelCache, file_digest
from manylora.models.stages import Stages, quiet

__all__ = ["convert", "ensure_converted", "is_gguf"]

_MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Whether the file begins as GGUF files do. Raises OSError."""
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def ensure_converted(path: Path, cache: ModelCache) -> Path:
    """The folder of the dequantised model, found again by the file's content. Raises ModelUnusable."""
    with Stages() as stages:
        with stages.step(f"Reading {path.name}"):
            name = f"{slug(path.stem)}-{file_digest(path)[:16]}"

        def build(folder: Path) -> None:
            with stages.step(f"Dequantising {path.name}"):
                convert(path, folder)

        return cache.get(name, build, on_wait=lambda: stages.say("Another start is dequantising it; waiting"))


def convert(path: Path, folder: Path) -> None:
    """Save the model and the tokenizer of a GGUF file in `folder`. Raises ModelUnusable."""
    import torch
    import transformers
    from safetensors import SafetensorError

    try:
        with quiet():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                quantization_config=transformers.GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
                local_files_only=True,
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True
            )
            _repair_splitting(path, tokenizer)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except (ValueError, RuntimeError, LookupError, struct.error, SafetensorError) as error:
        raise ModelUnusable(
            f"{path} cannot be dequantised by transformers {transformers.__version__}: {error}. "
            "Serve the original Hugging Face checkpoint instead."
        ) from error


def _repair_splitting(path: Path, tokenizer: Any) -> None:
    """SmolLM splits digits from the text around them; GGUF says so by name only, and transformers does not look."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(path).fields.get("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )


def slug(text: str) -> str:
    """A file or model name in the characters that names of adapters and models use."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._") or "model"
