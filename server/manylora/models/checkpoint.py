"""A Hugging Face folder, read with every way it can be wrong told apart. Safetensors only; no code from the folder."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from manylora.errors import ModelUnusable
from manylora.models.stages import quiet

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load_model", "load_tokenizer", "num_parameters", "read_config", "weight_files"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "tokenizer_config.json",
    "spiece.model",
    "tekken.json",
)
_SHOWN = 4  # names listed in one message


def read_config(folder: Path) -> "PretrainedConfig":
    """The config of a causal language model. Raises ModelUnusable for anything else."""
    import transformers

    raw = _config_json(folder)
    _refuse_others(folder, raw)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as error:
        if not _is_known(raw.get("model_type")):
            raise ModelUnusable(
                f"{folder}: transformers {transformers.__version__} has no model of type {raw.get('model_type')!r}, "
                "and code shipped with a model is never run. Choose another model, or a newer transformers."
            ) from error
        raise ModelUnusable(f"{folder / 'config.json'} is not usable: {error}") from error
    _require_causal(folder, config)
    return config


def _config_json(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            hint = "It is an adapter: give its parent folder with --adapters, and the base as MODEL."
        elif files := sorted(folder.glob("*.gguf")):
            hint = f"For a GGUF model give the file: {files[0]}."
        else:
            hint = "Give the folder of a Hugging Face checkpoint."
        raise ModelUnusable(f"{folder} has no config.json. {hint}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelUnusable(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ModelUnusable(f"{path} is no JSON object.")
    return raw


def _refuse_others(folder: Path, raw: dict[str, Any]) -> None:
    if raw.get("is_encoder_decoder"):
        raise ModelUnusable(f"{folder} holds an encoder-decoder model. Only decoder-only language models are served.")
    quantized = raw.get("quantization_config")
    if isinstance(quantized, dict):
        method = quantized.get("quant_method", "an unnamed method")
        raise ModelUnusable(
            f"{folder} is quantised with {method}, which is not supported. Give the unquantised checkpoint."
        )


def _is_known(model_type: object) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def _require_causal(folder: Path, config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    wanted = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    classes = {wanted} if isinstance(wanted, str) else set(wanted or ())
    stated = list(getattr(config, "architectures", None) or ())
    if not classes or (stated and not classes & set(stated)) or getattr(config, "is_decoder", True) is False:
        what = ", ".join(stated) or config.model_type
        raise ModelUnusable(f"{folder} holds {what}, which is no causal language model. Choose a decoder-only one.")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, all present. Raises ModelUnusable."""
    if (folder / _INDEX).is_file():
        try:
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            names = sorted({str(name) for name in index["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelUnusable(f"{folder / _INDEX} is not usable: {error}") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelUnusable(f"{folder} lacks {_some(missing)}. Fetch the checkpoint again.")
        return [folder / name for name in names]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if any(path for pattern in _PICKLES for path in folder.glob(pattern)):
        raise ModelUnusable(
            f"{folder} has its weights as pickles only, which can run code when read. "
            "Convert them to safetensors (`model.save_pretrained` in transformers does it)."
        )
    raise ModelUnusable(f"{folder} has no weights: neither {_SINGLE} nor {_INDEX}.")


def num_parameters(folder: Path) -> int:
    """Numbers in the checkpoint's tensors, from the files' headers. Raises ModelUnusable."""
    total = 0
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # not a dict
                    count = 1
                    for size in file.get_slice(name).get_shape():
                        count *= size
                    total += count
        except (SafetensorError, OSError) as error:
            raise ModelUnusable(f"{path} is no whole safetensors file: {error}. Fetch the checkpoint again.") from error
    return total


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Raises ModelUnusable where there is none, or one that needs code from the folder."""
    import transformers

    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ModelUnusable(f"{folder} has no tokenizer (tokenizer.json). Copy the tokenizer's files beside the model.")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a bad file
        raise ModelUnusable(f"The tokenizer in {folder} cannot be loaded: {error}") from error


def load_model(folder: Path, config: "PretrainedConfig", dtype: "torch.dtype") -> "PreTrainedModel":
    """The model on the CPU, every weight from the files. Raises ModelUnusable."""
    import transformers

    try:
        with quiet():
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, SafetensorError) as error:
        raise ModelUnusable(f"The model in {folder} cannot be loaded: {error}") from error
    # transformers fills what the files lack with random numbers and goes on.
    if missing := sorted(str(name) for name in info["missing_keys"]):
        raise ModelUnusable(f"The weights in {folder} lack {_some(missing)}. Fetch the checkpoint again.")
    if mismatched := sorted(str(entry[0]) for entry in info.get("mismatched_keys", ())):
        raise ModelUnusable(f"The weights in {folder} do not fit its config.json: {_some(mismatched)}.")
    return model


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
