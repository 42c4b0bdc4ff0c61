"""Random adapters written by PEFT itself, large enough that greedy answers change."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def make_adapter(
    model_dir: Path,
    folder: Path,
    *,
    rank: int = 8,
    targets: list[str] | str = "all-linear",
    alpha: float | None = None,
    seed: int = 0,
    strength: float = 0.5,
    auto: Any = AutoModelForCausalLM,
    **lora: Any,
) -> Path:
    """Save an adapter for the model in `model_dir`, of the Auto class `auto`; `lora`: other fields of PEFT's config."""
    model = auto.from_pretrained(model_dir, dtype=torch.float32)
    return write_adapter(model, folder, rank=rank, targets=targets, alpha=alpha, seed=seed, strength=strength, **lora)


def write_adapter(
    model: Any,
    folder: Path,
    *,
    rank: int = 8,
    targets: list[str] | str = "all-linear",
    alpha: float | None = None,
    seed: int = 0,
    strength: float = 0.5,
    **lora: Any,
) -> Path:
    """Save an adapter for `model`, into which PEFT puts its own layers."""
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=targets, **lora
    )
    with warnings.catch_warnings():  # of tied weights, and of fan_in_fan_out, which PEFT sets right by itself
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, config)
        with torch.no_grad():
            for name, weight in tuned.named_parameters():
                if "lora_" in name:
                    weight.normal_(0.0, (strength / weight.shape[-1]) ** 0.5)
        tuned.save_pretrained(folder)
    return folder


def make_adapter_that_spoils(model_dir: Path, folder: Path, token_id: int) -> Path:
    """Save an adapter of finite numbers whose logits hold NaN or infinity behind one token, and nowhere else."""
    make_adapter(model_dir, folder, targets=["embed_tokens", "q_proj"])
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[next(name for name in tensors if "lora_embedding_A" in name)][:, token_id] = 3e38
    save_file(tensors, path, metadata={"format": "pt"})
    return folder
