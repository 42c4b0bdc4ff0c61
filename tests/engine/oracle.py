"""The oracle: Hugging Face `generate` and PEFT, in float32, one request at a time."""

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

NEAR_TIE = 1e-3  # logits closer than this may come out in either order


def with_adapter(model_dir: Path, adapter: Path | None) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    if adapter is None:
        return model
    with warnings.catch_warnings():  # of tied weights, and of names that transformers is about to drop
        warnings.simplefilter("ignore")
        tuned: PreTrainedModel = PeftModel.from_pretrained(model, adapter).eval()
    return tuned


class Together(nn.Module):
    """A module of the base moved by what PEFT makes of it for each adapter: y + sum of weight * (y_adapter - y)."""

    def __init__(self, base: nn.Module, parts: Sequence[tuple[nn.Module, float]]) -> None:
        super().__init__()
        self.base = base
        self.weight: torch.Tensor = base.weight  # type: ignore[assignment]
        self.parts = parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        moved = y.clone()
        for module, weight in self.parts:
            moved += weight * (module(x) - y)
        return moved


def with_mix(model_dir: Path, parts: Sequence[tuple[Path, float]]) -> PreTrainedModel:
    """The base, each of whose modules is moved by PEFT's modules of several adapters, each times its weight."""
    model = with_adapter(model_dir, None)
    tuned = [(with_adapter(model_dir, folder).base_model.model, weight) for folder, weight in parts]
    for path, module in list(model.named_modules()):
        if isinstance(getattr(module, "weight", None), torch.Tensor):
            found = [(each.get_submodule(path), weight) for each, weight in tuned]
            model.set_submodule(path, Together(module, found))
    return model


@torch.inference_mode()
def generate(model: PreTrainedModel, prompt: Sequence[int], max_tokens: int) -> list[int]:
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        min_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@torch.inference_mode()
def check_greedy(model: PreTrainedModel, prompt: Sequence[int], found: Sequence[int]) -> None:
    """`found` is what greedy decoding gives, token by token, up to near-ties of the logits.

    Of virtual tokens what counts is a pass over everything, as in training: PEFT's `generate` counts positions
    otherwise once it reads from its cache, or leaves a prefix out.
    """
    has_virtual = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    if not has_virtual and list(found) == generate(model, prompt, len(found)):
        return
    logits = model(torch.tensor([[*prompt, *found[:-1]]])).logits[0, -len(found) :]
    expected = logits.argmax(dim=1).tolist()
    for step, token in enumerate(found):
        behind = float(logits[step].max() - logits[step, token])
        assert behind <= NEAR_TIE, f"token {step} is {token}, {behind:.4f} below the best; expected {expected}"


def check_served(model_dir: Path, adapter: Path | None, prompt: Sequence[int], found: Sequence[int]) -> None:
    """As `check_greedy`, by the model and the adapter in these folders, which stay as they are.

    Kernels and batches of any size are to give the same tokens, which are checked once: to load a model takes longer
    than to serve it.
    """
    _check_once(model_dir, adapter, tuple(prompt), tuple(found))


@functools.cache
def _check_once(model_dir: Path, adapter: Path | None, prompt: tuple[int, ...], found: tuple[int, ...]) -> None:
    check_greedy(with_adapter(model_dir, adapter), prompt, found)
