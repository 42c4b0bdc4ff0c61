"""What a training makes small: the surprise at the answers, or, of pairs of answers, how little one is preferred.

Both sum over their examples, so that batches of any size add up to the same step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.nn import functional

from manylora.lifecycle.base import Base, accepts_logits_to_keep
from manylora.lifecycle.data.batches import answer_nll, collate
from manylora.lifecycle.data.encoding import Encoded

__all__ = ["Answers", "Objective", "Preferences", "Summed"]


@dataclass(frozen=True, slots=True)
class Summed:
    """Of some examples: the loss, a scalar with a gradient, the tokens that were run, and what else is to be told.

    Each is a sum; `Objective.weight` says what to divide by.
    """

    loss: torch.Tensor
    num_tokens: int
    values: dict[str, float] = field(default_factory=dict)


class Objective(Protocol):
    """One way to learn."""

    def weight(self, example: Encoded) -> int:
        """What the example counts in a mean."""
        ...

    def summed(self, examples: Sequence[Encoded]) -> Summed:
        """In one forward pass of the model, as it is in (training or evaluation)."""
        ...


class Answers:
    """Mean negative log-likelihood of an answer token, in nats."""

    def __init__(self, model: Any, base: Base) -> None:
        self._model = model
        self._base = base
        self._keeps_logits = accepts_logits_to_keep(base.model)

    def weight(self, example: Encoded) -> int:
        return example.num_answer_tokens

    def summed(self, examples: Sequence[Encoded]) -> Summed:
        batch = collate(examples, pad_id=self._base.pad_id, device=self._base.device)
        nll = answer_nll(self._model, batch, keeps_logits=self._keeps_logits)
        return Summed(nll.sum(), batch.num_tokens)


class Preferences:
    """Direct preference optimisation (Rafailov et al., 2023), mean of a pair.

    loss = -log sigmoid(margin), margin = beta * ((log p(wanted) - log q(wanted)) - (log p(rejected) - log q(rejected)))

    with p the model and q the reference, which is the model with its adapter off. `values`: the `margin`, and how many
    pairs have one above zero (`preferred`).
    """

    def __init__(self, model: Any, base: Base, beta: float) -> None:
        self._model = model
        self._base = base
        self._beta = beta
        self._keeps_logits = accepts_logits_to_keep(base.model)

    def weight(self, _example: Encoded) -> int:
        return 1

    def summed(self, examples: Sequence[Encoded]) -> Summed:
        rejected = [example.rejected for example in examples if example.rejected is not None]
        assert len(rejected) == len(examples), "the rows were checked"
        batch = collate([*examples, *rejected], pad_id=self._base.pad_id, device=self._base.device)
        with torch.no_grad(), self._reference():
            before = answer_nll(self._model, batch, keeps_logits=self._keeps_logits).sum(1)
        moved = before - answer_nll(self._model, batch, keeps_logits=self._keeps_logits).sum(1)
        margin = self._beta * (moved[: len(examples)] - moved[len(examples) :])
        told = margin.detach()
        values = {"margin": float(told.sum()), "preferred": float((told > 0).sum())}
        return Summed(-functional.logsigmoid(margin).sum(), batch.num_tokens, values)

    @contextmanager
    def _reference(self) -> Iterator[None]:
        """The base as it answers: without the adapter, and without what is random in training."""
        is_training = self._model.training
        self._model.eval()
        try:
            with self._model.disable_adapter():
                yield
        finally:
            self._model.train(is_training)
