"""Batches of examples: bucketed by length, padded on the left so that the answers end together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from manylora.errors import InvalidRequest
from manylora.lifecycle.data.encoding import Encoded

_BUCKET = 32  # batches that are sorted by length together: enough to pad little, few enough to stay shuffled


@dataclass(frozen=True, slots=True)
class Batch:
    """`ids`, `mask` and `positions` are [rows, length]; `targets` is [rows, kept], -100 where nothing is learnt.

    Only the last `kept` positions predict something, so only there are logits needed.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor

    @property
    def num_targets(self) -> int:
        return int((self.targets != -100).sum())

    @property
    def num_tokens(self) -> int:
        return int(self.mask.sum())


def epoch_order(lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Indices of one epoch's batches: shuffled, then sorted by length within buckets, then shuffled again.

    The same seed and epoch give the same order, which is what lets a training resume in the middle.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
    width = batch_size * _BUCKET
    batches: list[list[int]] = []
    for start in range(0, len(order), width):
        bucket = sorted(order[start : start + width], key=lambda i: lengths[i])
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[i] for i in shuffled]


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """The share of positions that are padding when each batch is as long as its longest example."""
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths) / padded


def sorted_batches(examples: Sequence[Encoded], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of like length, for evaluation, where order does not matter."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def collate(examples: Sequence[Encoded], *, pad_id: int, device: torch.device) -> Batch:
    """Pad on the left. `kept` = the longest tail that starts with an answer token."""
    length = max(len(e) for e in examples)
    kept = max(len(e) - e.first_answer for e in examples)
    ids = torch.full((len(examples), length), pad_id)
    mask = torch.zeros((len(examples), length), dtype=torch.long)
    targets = torch.full((len(examples), kept), -100)
    for row, example in enumerate(examples):
        tokens = torch.tensor(example.ids)
        ids[row, length - len(example) :] = tokens
        mask[row, length - len(example) :] = 1
        learnt = torch.tensor(example.is_answer)
        tail = min(kept, len(example))
        targets[row, kept - tail :] = torch.where(learnt, tokens, -100)[len(example) - tail :]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return Batch(ids.to(device), mask.to(device), positions.to(device), targets.to(device))


def check_known(examples: Sequence[Encoded], num_embeddings: int) -> None:
    """Raises InvalidRequest for a token that the model has no embedding for, with its row."""
    for example in examples:
        highest = max((*example.ids, *(example.rejected.ids if example.rejected is not None else ())))
        if highest >= num_embeddings:
            raise InvalidRequest(
                f"row {example.example.row} has the token {highest}, and the model has embeddings for 0 to "
                f"{num_embeddings - 1} only, fewer than its tokenizer has tokens. Leave out what becomes such a token."
            )


def answer_nll(model: Any, batch: Batch, *, keeps_logits: bool) -> torch.Tensor:
    """Negative log-likelihood of each target, [rows, kept], in nats; 0 where nothing is learnt. fp32.

    The first target of a row is predicted by the position before it, so one more logit is kept than targets.
    """
    kept = batch.targets.shape[1]
    extra = {"logits_to_keep": kept + 1} if keeps_logits else {}
    logits = model(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, **extra).logits
    predicting = logits[:, -(kept + 1) : -1] if logits.shape[1] > kept else functional.pad(logits[:, :-1], (0, 0, 1, 0))
    flat = functional.cross_entropy(
        predicting.float().flatten(0, 1), batch.targets.flatten(), reduction="none", ignore_index=-100
    )
    return flat.view_as(batch.targets)
