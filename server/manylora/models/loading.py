"""From what the user calls a model to a frozen one in memory, with its tokenizer."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from manylora.chat.format import FormatOverrides
from manylora.errors import ModelUnusable, NotEnoughMemory
from manylora.models import backends, checkpoint, default_model, four_bits, gguf, minilm_package, whisper_package
from manylora.models.model_cache import default_cache

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from manylora.models.codec import HuggingFaceCodec
    from manylora.settings import Settings

__all__ = ["GenerationDefaults", "LoadedBase", "base_name", "check_memory", "load_base", "resolve_model"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Sampling defaults: the model's own where its generation config has some, otherwise OpenAI's."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """A frozen causal language model in eval mode on its device, and what belongs to it.

    `name` is the served one, `backend` what it is to be computed by.
    """

    model: "PreTrainedModel"
    codec: "HuggingFaceCodec"
    config: "PretrainedConfig"
    generation: GenerationDefaults
    name: str
    folder: Path
    backend: backends.Backend


def resolve_model(model: str | None) -> Path:
    """The checkpoint folder of a model: a directory, a GGUF file, a Hugging Face id, or None for the default.

    `whisper-tiny.en` and `all-minilm-l6-v2` are fetched out of packages.

    Downloads, dequantises and caches where needed. Raises ModelUnusable.
    """
    if model is None:
        return default_model.ensure()
    path = Path(model).expanduser()
    if model and path.is_dir():
        return _plain(path)
    if path.is_file():
        if not gguf.is_gguf(path):
            raise ModelUnusable(f"{path} is no GGUF file. Give a GGUF file or the folder of a Hugging Face checkpoint.")
        return gguf.ensure_converted(path, default_cache())
    if model == whisper_package.NAME:
        return whisper_package.ensure_whisper()
    if model == minilm_package.NAME:
        return minilm_package.ensure_minilm()
    if model.startswith((".", "/", "~")) or model.endswith(".gguf") or not _HUB_ID.fullmatch(model):
        raise ModelUnusable(f"There is no model at {model!r}. Give a folder, a GGUF file or a Hugging Face id.")
    return _plain(_from_hub(model))


def _plain(folder: Path) -> Path:
    """The folder, or that of its whole weights where they are packed in 4 bits."""
    if (folder / "config.json").is_file() and four_bits.is_four_bits(folder):
        return four_bits.ensure_plain(folder, default_cache())
    return folder


def _from_hub(model: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    repo, _, revision = model.partition("@")
    try:
        return Path(
            snapshot_download(repo, revision=revision or None, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"])
        )
    except errors.GatedRepoError as error:
        raise ModelUnusable(
            f"{repo} asks for its licence to be accepted on huggingface.co; then set HF_TOKEN and start again."
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise ModelUnusable(
            f"There is no folder {model!r} here and no such model on huggingface.co. Check the name; "
            "for a private model set HF_TOKEN."
        ) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise ModelUnusable(
            f"There is no folder {model!r} here, and huggingface.co cannot be reached to look for a model of that "
            "name, nor was it fetched before. Check the network, or give a local folder."
        ) from error


def load_base(settings: "Settings") -> LoadedBase:
    """Find, check and load the base model. Raises ModelUnusable, NotEnoughMemory or InvalidSettings."""
    backend = backends.choose(settings)
    folder = resolve_model(settings.model)
    config = checkpoint.read_config(folder, to_serve=True)
    dtype = backends.select_dtype(settings.dtype, backend.device, getattr(config, "dtype", None))
    check_memory(folder, dtype, backend.device)
    tokenizer = checkpoint.load_tokenizer(folder)
    model = checkpoint.load_model(folder, config, dtype).to(backend.device)
    model.requires_grad_(False)
    model.eval()
    from manylora.models.codec import HuggingFaceCodec

    return LoadedBase(
        model=model,
        codec=HuggingFaceCodec(
            tokenizer,
            _eos_ids(model, tokenizer),
            FormatOverrides(settings.tool_parser, settings.tool_prompt, settings.reasoning_marks),
        ),
        config=config,
        generation=_generation_defaults(model.generation_config),
        name=settings.served_name or base_name(settings.model),
        folder=folder,
        backend=backend,
    )


def base_name(model: str | None) -> str:
    """The name a model is served under unless told otherwise: its last path component, without revision or suffix."""
    if model is None:
        return default_model.NAME
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve().name
    return path.stem if path.suffix == ".gguf" else path.name.partition("@")[0]


def check_memory(folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Raises NotEnoughMemory where the checkpoint's weights are more than what is free."""
    needed = checkpoint.num_parameters(folder) * dtype.itemsize
    free = backends.free_bytes(device)
    if needed > free:
        raise NotEnoughMemory(
            f"The weights in {folder.name} take {needed / 2**30:.1f} GiB as {str(dtype).removeprefix('torch.')} and "
            f"{free / 2**30:.1f} GiB are free on {device}. Choose a smaller model or a smaller --dtype."
        )


def _eos_ids(model: Any, tokenizer: Any) -> set[int]:
    """All tokens that end an answer: the generation config's, the model config's and the tokenizer's."""
    found: set[int] = set()
    for value in (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config.get_text_config(), "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        ids: Iterable[Any] = value if isinstance(value, list | tuple) else (value,)
        found.update(int(i) for i in ids if i is not None)
    return found


def _generation_defaults(config: Any) -> GenerationDefaults:
    said = {name: getattr(config, name, None) for name in GenerationDefaults.__dataclass_fields__}
    return GenerationDefaults(**{name: value for name, value in said.items() if value is not None})
