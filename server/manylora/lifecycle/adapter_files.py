"""Writing an adapter in PEFT layout: `adapter_config.json`, `adapter_model.safetensors`, `README.md`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from manylora.errors import InvalidRequest
from manylora.identity import CONFIG_FILE, TENSOR_FILE
from manylora.lifecycle.output import safetensors_as_os_errors


def write_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> int:
    """Write config and tensors into an existing folder; the size of the weights in bytes. Raises OSError."""
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
    with safetensors_as_os_errors("the weights"):
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / TENSOR_FILE, metadata={"format": "pt"})
    (folder / TENSOR_FILE).chmod(0o644)  # safetensors leaves the file to its owner alone
    return (folder / TENSOR_FILE).stat().st_size


def read_adapter_files(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and tensors as they lie in a folder. Raises InvalidRequest when it is no adapter."""
    for name in (CONFIG_FILE, TENSOR_FILE):
        if not (folder / name).is_file():
            raise InvalidRequest(f"{folder} is not an adapter in PEFT layout: {name} is missing.")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidRequest(f"{folder / CONFIG_FILE} is not JSON: {error}") from error
    try:
        tensors = load_file(folder / TENSOR_FILE)
    except SafetensorError as error:
        raise InvalidRequest(f"{folder / TENSOR_FILE} is not a safetensors file: {error}") from error
    if not isinstance(config, dict):
        raise InvalidRequest(f"{folder / CONFIG_FILE} is not a JSON object.")
    return config, tensors


def plain_config(peft_config: Any, base_name: str) -> dict[str, Any]:
    """A PEFT config as JSON values with only what differs from PEFT's defaults, beside the essential keys.

    Fewer keys, fewer ways for an older or stricter reader to stumble.
    """
    from peft import LoraConfig

    values = _jsonable(peft_config.to_dict())
    defaults = _jsonable(LoraConfig().to_dict())
    essential = {"peft_type", "task_type", "r", "lora_alpha", "target_modules", "base_model_name_or_path", "bias"}
    kept = {k: v for k, v in values.items() if k in essential or (v != defaults.get(k) and k != "inference_mode")}
    return kept | {"base_model_name_or_path": base_name, "inference_mode": True}


def _jsonable(values: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, set):
            value = sorted(value)
        out[key] = getattr(value, "value", value)
    return out
