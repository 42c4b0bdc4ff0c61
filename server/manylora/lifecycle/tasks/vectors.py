"""Vectors: texts that belong together are moved closer than others, and searched by it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch.nn import functional

from manylora.lifecycle.data.data import Dataset
from manylora.lifecycle.data.encoding import Encoded
from manylora.lifecycle.parameters import InvalidParameter
from manylora.lifecycle.tasks.encoders import load_encoder, padded
from manylora.lifecycle.tasks.interface import Measured, Metric, Source, TaskBase
from manylora.lifecycle.tasks.labels import TextEncoder
from manylora.lifecycle.train.objectives import Summed
from manylora.models.sentence import sentence_settings

__all__ = ["Belonging", "Vectors"]

_SCALE: Final = 20.0  # of cosines, which are between -1 and 1, to what a softmax tells apart
_TOLD: Final = 10  # documents of a ranking that nDCG looks at
_BATCH: Final = 32


@dataclass(frozen=True, slots=True)
class Belonging(Encoded):
    """`texts`: tokens of the anchor, of the text that belongs to it, and perhaps of one that does not."""

    texts: tuple[tuple[int, ...], ...] = ()


class Vectors:
    """Vectors of texts. Implements `interface.Task`."""

    unit: Final = "pair"
    lower: Final = frozenset[str]()

    def labels(self, _dataset: Dataset) -> tuple[str, ...]:
        return ()

    def load(self, source: Source, _labels: tuple[str, ...]) -> TaskBase:
        return load_encoder(source)

    def encode(self, dataset: Dataset, source: Source, max_length: int) -> list[Encoded]:
        """Each text by itself, as for `/v1/embeddings`; one that is too long is cut at its end."""
        encoder = TextEncoder(source.model, max_length=max_length)
        found: list[Encoded] = []
        for example in dataset.examples:
            said = [each.content for each in (*example.messages, *([example.rejected] if example.rejected else []))]
            texts = [encoder.ids(text) for text in said]
            if not all(ids for ids, _ in texts):
                raise InvalidParameter(f"`data`: row {example.row} has a text without tokens for this base.")
            ids = tuple(token for each, _ in texts for token in each)
            is_answer = (*[False] * (len(ids) - 1), True)
            whole = tuple(tuple(each) for each, _ in texts)
            found.append(Belonging(example, ids, is_answer, num_cut=sum(cut for _, cut in texts), texts=whole))
        return found

    def objective(self, model: Any, base: TaskBase) -> "Closeness":
        return Closeness(model, base, pooling_of(base))

    def measured(self, model: Any, base: TaskBase, examples: Sequence[Encoded]) -> Measured:
        """nDCG of the first ten, reciprocal rank and area under the curve, each the mean over the anchors.

        Ranked are, by the cosine, the texts that the anchor's own rows have; where these name none that does not belong
        to it, those of all rows.
        """
        model.eval()
        by_anchor: dict[str, dict[str, bool]] = {}
        ids: dict[str, tuple[int, ...]] = {}
        every: set[str] = set()
        for each in examples:
            example, texts = each.example, _belonging(each).texts
            said = [message.content for message in example.messages]
            rejected = [] if example.rejected is None else [example.rejected.content]
            ids |= dict(zip([*said, *rejected], texts, strict=True))
            own = by_anchor.setdefault(said[0], {})
            own |= {text: own.get(text, False) for text in rejected} | {said[1]: True}
            every |= {said[1], *rejected}
        every_text = list(ids)
        with torch.inference_mode():
            parts = [every_text[at : at + _BATCH] for at in range(0, len(every_text), _BATCH)]
            found = [_vectors(model, base, [ids[text] for text in part], pooling_of(base))[0] for part in parts]
        vectors = dict(zip(every_text, torch.cat(found).cpu().numpy(), strict=True))
        figures = np.array([
            _figures(vectors[anchor], {text: vectors[text] for text in sorted(own if False in own.values() else every)},
                     {text for text, belongs in own.items() if belongs})
            for anchor, own in by_anchor.items()
        ])  # fmt: skip
        names = (f"ndcg_{_TOLD}", "mrr", "auc")
        metrics: dict[str, Metric] = {name: _mean(figures[:, column]) for column, name in enumerate(names)}
        return Measured(len(figures), metrics)


def _mean(values: np.ndarray[Any, Any]) -> Metric:
    return lambda some: float(values[some].mean())


def _figures(
    anchor: np.ndarray[Any, Any], candidates: dict[str, np.ndarray[Any, Any]], wanted: set[str]
) -> tuple[float, float, float]:
    """nDCG, reciprocal rank and area under the curve of one ranking."""
    order = sorted(candidates, key=lambda text: -float(anchor @ candidates[text]))
    is_wanted = np.array([text in wanted for text in order])
    gains = 1 / np.log2(np.arange(2, len(order) + 2))
    ndcg = float((gains * is_wanted)[:_TOLD].sum() / gains[: min(_TOLD, int(is_wanted.sum()))].sum())
    others = int((~is_wanted).sum())
    before = np.cumsum(~is_wanted)[is_wanted]  # of the others, those that stand before each wanted one
    auc = float(1 - before.mean() / others) if others else 1.0
    return ndcg, 1 / (1 + int(is_wanted.argmax())), auc


class Closeness:
    """Implements `objectives.Objective`: mean negative log-likelihood of the text that belongs, in nats.

    A row that names a text which does not belong is told apart from those of the batch, one that names none from all
    of the batch's texts; what belongs to the same anchor is never among them.
    """

    def __init__(self, model: Any, base: TaskBase, pooling: str) -> None:
        self._model = model
        self._base = base
        self._pooling = pooling

    def weight(self, _example: Encoded) -> int:
        return 1

    def summed(self, examples: Sequence[Encoded]) -> Summed:
        rows = [_belonging(each) for each in examples]
        ids = [row.texts[0] for row in rows] + [row.texts[1] for row in rows]
        ids += [row.texts[2] for row in rows if len(row.texts) > 2]
        vectors, num_tokens = _vectors(self._model, self._base, ids, self._pooling)
        count = len(rows)
        scores = _SCALE * vectors[:count] @ vectors[count:].T
        belongs = {(row.texts[0], row.texts[1]) for row in rows}
        aside = [
            [place != number and ((place < count and len(row.texts) > 2) or (row.texts[0], document) in belongs)
             for place, document in enumerate(ids[count:])]
            for number, row in enumerate(rows)
        ]  # fmt: skip
        scores = scores.masked_fill(torch.tensor(aside, device=scores.device), -torch.inf)
        wanted = torch.arange(count, device=scores.device)
        return Summed(functional.cross_entropy(scores, wanted, reduction="sum"), num_tokens)


def _belonging(example: Encoded) -> Belonging:
    assert isinstance(example, Belonging), "the task encoded it"
    return example


def pooling_of(base: TaskBase) -> str:
    """How a server of the base makes one vector of a text's states."""
    return sentence_settings(base.folder).pooling or "mean"


def _vectors(model: Any, base: TaskBase, texts: Sequence[Sequence[int]], pooling: str) -> tuple[torch.Tensor, int]:
    """Vectors [texts, hidden] of length 1, and how many tokens they took."""
    ids, mask = padded(base, texts)
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    if pooling == "mean":
        found = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    else:
        places = mask.sum(1) - 1 if pooling == "last" else torch.zeros_like(mask[:, 0])
        found = states[torch.arange(len(states), device=states.device), places]
    return functional.normalize(found, dim=-1), int(mask.sum())
