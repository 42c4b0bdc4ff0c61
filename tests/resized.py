"""Adapters made by PEFT for a model whose vocabulary was resized before, and what PEFT makes of them."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel


def resized(model_dir: Path, size: int) -> PreTrainedModel:
    """The base with rows for `size` tokens."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(size)
    return model


def make_resized(model_dir: Path, folder: Path, size: int, *, seed: int = 0, **settings: Any) -> Path:
    """Save a LoRA adapter for the base resized to `size` tokens; `settings` are LoraConfig's."""
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "target_modules": ["q_proj", "down_proj"], **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(resized(model_dir, size), config)
        with torch.no_grad():
            for weight in tuned.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn_like(weight) * 0.2)
        tuned.save_pretrained(folder)
    return folder


def with_resized(model_dir: Path, folder: Path, size: int) -> PreTrainedModel:
    """What PEFT loads of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned: PreTrainedModel = PeftModel.from_pretrained(resized(model_dir, size), folder).eval()
    return tuned
