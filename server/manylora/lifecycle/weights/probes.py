"""Measuring that two models compute the same: logits on fixed prompts."""

from dataclasses import dataclass
from typing import Any

import torch

PROMPTS = (
    "The capital of France is",
    "SELECT name FROM users WHERE",
    "我爱北京天安门",
    "Dear customer, thank you for your letter of",
)


@dataclass(frozen=True, slots=True)
class Difference:
    """Over all positions of all prompts: logits and divergence (nats), and how often the likeliest token agrees."""

    max_abs_logit: float
    mean_kl: float
    same_top_token: float
    num_positions: int


@torch.inference_mode()
def logits_of(model: Any, tokenizer: Any) -> list[torch.Tensor]:
    """[length, vocab] in fp32 for each of `PROMPTS`."""
    device = next(model.parameters()).device
    out = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=device)
        out.append(model(input_ids=ids).logits[0].float().cpu())
    return out


def difference(expected: list[torch.Tensor], found: list[torch.Tensor]) -> Difference:
    want, have = torch.cat(expected), torch.cat(found)
    log_want, log_have = want.log_softmax(-1), have.log_softmax(-1)
    kl = (log_want.exp() * (log_want - log_have)).sum(-1)
    return Difference(
        max_abs_logit=float((want - have).abs().max()),
        mean_kl=max(0.0, float(kl.mean())),
        same_top_token=float((want.argmax(-1) == have.argmax(-1)).float().mean()),
        num_positions=len(want),
    )
