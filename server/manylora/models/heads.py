"""How the heads of a base's tasks compute, found out from the classes that transformers has for them.

A head is run on made-up hidden states, with random weights, in the place where the model would have it: which of the
states it reads, which layers it has and what stands between them is what the numbers say. One that does not come out as
a row of linears and norms is not served.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from manylora.lora.format.heads import EACH_TOKEN, QUESTION_LABELS, Activation, HeadPlan, HeadStage, Source
from manylora.lora.format.spec import BaseWeights
from manylora.models import checkpoint
from manylora.models.modules import hidden_size, token_embedding
from manylora.models.stored_weights import StoredWeights

__all__ = ["ACTIVATIONS", "decoder_heads", "head_plans"]

ACTIVATIONS: Final[Mapping[Activation, Callable[[torch.Tensor], torch.Tensor]]] = {
    "none": lambda x: x,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": functional.gelu,
}
_CLASSES: Final = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
}
_NUM_LABELS: Final = 3
_LENGTH: Final = 5


def head_plans(model: PreTrainedModel, weights: BaseWeights, tasks: Iterable[str] = _CLASSES) -> dict[str, HeadPlan]:
    """The plan of each of PEFT's `tasks` whose head can be served over this base.

    `weights`: the base's checkpoint, which may have layers of the head that adapters do not bring.
    """
    found: dict[str, HeadPlan] = {}
    for task in tasks:
        try:
            auto = AutoModelForImageClassification if token_embedding(model) is None else _CLASSES[task]
            plan = _plan(task, auto, model, weights)
        except Exception:  # noqa: BLE001, S112 - of a model's own code: what cannot be followed is not served
            continue
        if plan is not None:
            found[task] = plan
    return found


def decoder_heads(model: PreTrainedModel, folder: Path) -> dict[str, HeadPlan]:
    """Of a decoder, which gives each text's labels by its last token; `folder` has its checkpoint."""
    if model.base_model is model or checkpoint.has_more_than_text(model.config):
        return {}
    return head_plans(model, StoredWeights(folder, {}), ("SEQ_CLS",))


@dataclass
class _States(BaseModelOutputWithPooling):  # type: ignore[misc]
    """What a base gives, with the names that decoders have beside those of encoders."""

    cache: Any = None
    past_key_values: Any = None


class _Stub(nn.Module):
    """Stands where the base stood, and answers with states that are handed to it."""

    def __init__(self, states: torch.Tensor, pooled: torch.Tensor) -> None:
        super().__init__()
        self._output = _States(last_hidden_state=states, pooler_output=pooled)

    def forward(self, *_args: Any, **_kwargs: Any) -> BaseModelOutputWithPooling:
        return self._output


def _plan(task: str, auto: Any, model: PreTrainedModel, weights: BaseWeights) -> HeadPlan | None:
    config = copy.deepcopy(model.config)
    config.num_labels = len(QUESTION_LABELS) if task == "QUESTION_ANS" else _NUM_LABELS
    with torch.device("meta"):
        whole = auto.from_config(config)
    random = torch.Generator().manual_seed(0)
    width = hidden_size(model)
    states = torch.randn(1, _LENGTH, width, generator=random)
    pooled = torch.tanh(torch.randn(1, width, generator=random))
    setattr(whole, model.base_model_prefix, _Stub(states, pooled))
    whole.to_empty(device="cpu").float().eval()
    seen: list[tuple[str, nn.Module, torch.Tensor, torch.Tensor]] = []
    for path, module in whole.named_modules():
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.2, generator=random)
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.register_forward_hook(lambda module, args, out, path=path: seen.append((path, module, args[0], out)))
    with torch.inference_mode():
        given = whole(**_inputs(model))
    logits = torch.stack((given.start_logits, given.end_logits), dim=-1) if task == "QUESTION_ANS" else given.logits
    source = _source(task, seen[0][2], states, pooled)
    if source is None or (source == "pooler" and getattr(model, "pooler", None) is None):
        return None
    stages = []
    for number, (path, module, _, out) in enumerate(seen):
        is_last = number + 1 == len(seen)
        following = logits if is_last else seen[number + 1][2]
        made = out[:, -1] if is_last and source == "last" else out
        activation = next((name for name, function in ACTIVATIONS.items() if _same(function(made), following)), None)
        if activation is None:
            return None
        stages.append(_stage(path, module, activation, weights, is_last=is_last))
    return HeadPlan(task, source, tuple(stages)) if isinstance(seen[-1][1], nn.Linear) else None


def _inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What the model with a head is called with, of which the stub in it makes nothing."""
    if token_embedding(model) is None:
        return {"pixel_values": torch.zeros(1, 3, 1, 1)}
    ids = torch.full((1, _LENGTH), 2 if model.config.pad_token_id != 2 else 3)  # padding is passed over by some
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _source(task: str, given: torch.Tensor, states: torch.Tensor, pooled: torch.Tensor) -> Source | None:
    sources: dict[Source, torch.Tensor] = (
        {"every": states}
        if task in EACH_TOKEN
        # Over each token, of which the last one's is kept: the numbers behind the head say whether it is that one.
        else {
            "pooler": pooled,
            "first": states[:, 0],
            "last": states,
            "mean": states.mean(dim=1),
            "rest": states[:, 1:].mean(dim=1),
            "first_and_rest": torch.cat([states[:, 0], states[:, 1:].mean(dim=1)], dim=1),
        }
    )
    return next((name for name, values in sources.items() if _same(values, given)), None)


def _same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-6)


def _stage(path: str, module: nn.Module, activation: Activation, weights: BaseWeights, *, is_last: bool) -> HeadStage:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    has_bias = isinstance(module.bias, torch.Tensor)
    stored = None if is_last else weights.find(path, "weight")
    return HeadStage(
        path=path,
        kind="norm" if isinstance(module, nn.LayerNorm) else "linear",
        in_features=int(weight.shape[-1]),
        out_features=None if is_last else int(weight.shape[0]),
        has_bias=has_bias,
        activation=activation,
        eps=float(module.eps) if isinstance(module, nn.LayerNorm) else 0.0,
        weight=stored,
        bias=weights.find(path, "bias") if stored is not None and has_bias else None,
    )
