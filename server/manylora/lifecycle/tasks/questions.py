"""Answers out of a text: a head with two scores for each token, that the answer begins there, or ends."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch.nn import functional

from manylora.lifecycle.data.data import Dataset, Example
from manylora.lifecycle.data.encoding import Encoded
from manylora.lifecycle.parameters import InvalidParameter
from manylora.lifecycle.tasks.encoders import codec_of, found_of, load_headed, longest, padded
from manylora.lifecycle.tasks.interface import Measured, Metric, Source, TaskBase
from manylora.lifecycle.train.objectives import Summed
from manylora.lora.format.heads import QUESTION_LABELS
from manylora.models.pairs import EncodedPair

__all__ = ["Asked", "Questions", "words_of"]

_MOST: Final = 15  # tokens of an answer, as many as a request asks for that says nothing of it


@dataclass(frozen=True, slots=True)
class Asked(Encoded):
    """`pair`: the question with its text. The answer's first and last token are at `places`; (0, 0): it has none."""

    pair: EncodedPair | None = None
    places: tuple[int, int] = (0, 0)


class Questions:
    """The words of a text that answer a question. Implements `interface.Task`."""

    unit: Final = "end of an answer"
    lower: Final = frozenset[str]()

    def labels(self, _dataset: Dataset) -> tuple[str, ...]:
        return ()

    def load(self, source: Source, _labels: tuple[str, ...]) -> TaskBase:
        return load_headed(source, "question", "QUESTION_ANS", QUESTION_LABELS)

    def encode(self, dataset: Dataset, source: Source, max_length: int) -> list[Encoded]:
        """Question and text as one prompt, of which what is too long is cut from the text's end."""
        most = longest(source, max_length)
        pairs = [(each.messages[0].content, each.messages[1].content) for each in dataset.examples]
        found = codec_of(source).encode_pairs(pairs)
        return [_encoded(example, pair, most) for example, pair in zip(dataset.examples, found, strict=True)]

    def objective(self, model: Any, base: TaskBase) -> "Ends":
        return Ends(model, base)

    def measured(self, model: Any, base: TaskBase, examples: Sequence[Encoded]) -> Measured:
        """SQuAD's: how many answers are exact, and the mean F1 of their words, of what stands there the likeliest."""
        may_be_none = any(not each.example.answer for each in examples)
        answers = found_of(model, examples, lambda some: _answers(model, base, some, may_be_none=may_be_none))
        pairs = [(words_of(each.example.answer), words_of(said)) for each, said in zip(examples, answers, strict=True)]
        exact = np.array([float(wanted == said) for wanted, said in pairs])
        shared = np.array([_f1(wanted, said) for wanted, said in pairs])
        metrics: dict[str, Metric] = {
            "exact_match": lambda some: float(exact[some].mean()),
            "word_f1": lambda some: float(shared[some].mean()),
        }
        return Measured(len(examples), metrics, {"answers": answers})


def words_of(text: str) -> list[str]:
    """The words that answers are compared by: in small letters, without punctuation, characters one by one in Han."""
    kept = "".join(f" {c} " if "\u4e00" <= c <= "\u9fff" else c if c.isalnum() else " " for c in text.lower())
    return kept.split()


def _f1(wanted: list[str], said: list[str]) -> float:
    if not wanted or not said:
        return float(wanted == said)
    return 2 * (Counter(wanted) & Counter(said)).total() / (len(wanted) + len(said))


class Ends:
    """Implements `objectives.Objective`: mean negative log-likelihood of an answer's two ends, in nats."""

    def __init__(self, model: Any, base: TaskBase) -> None:
        self._model = model
        self._base = base

    def weight(self, _example: Encoded) -> int:
        return 2

    def summed(self, examples: Sequence[Encoded]) -> Summed:
        logits, num_tokens = _logits(self._model, self._base, examples)
        places = torch.tensor([_asked(each).places for each in examples], device=self._base.device)
        loss = sum(functional.cross_entropy(logits[..., end], places[:, end], reduction="sum") for end in (0, 1))
        assert isinstance(loss, torch.Tensor)
        return Summed(loss, num_tokens)


def _asked(example: Encoded) -> Asked:
    assert isinstance(example, Asked), "the task encoded it"
    return example


def _pair(example: Encoded) -> EncodedPair:
    pair = _asked(example).pair
    assert pair is not None, "the task encoded it"
    return pair


def _encoded(example: Example, whole: EncodedPair, most: int) -> Asked:
    pair = whole.cut(most)
    if len(pair.ids) > most or not pair.second:
        raise InvalidParameter(f"`data`: row {example.row}'s question leaves its text no place within `max_length`.")
    places = (0, 0)
    if example.answer:
        begin, end = example.start, example.start + len(example.answer)
        inside = [
            place for place, (a, b) in zip(pair.second, pair.offsets, strict=True) if a < end and b > begin and b > a
        ]
        if not inside or pair.offsets[inside[-1] - pair.second.start][1] < end:
            if len(pair.ids) == len(whole.ids):
                raise InvalidParameter(f"`data`: row {example.row}'s answer has no tokens for this base.")
            raise InvalidParameter(f"`data`: row {example.row}'s answer is cut off. Raise `max_length`.")
        places = inside[0], inside[-1]
    elif pair.second.start == 0:
        raise InvalidParameter(f"`data`: row {example.row} has no answer, for which this base has no token.")
    is_answer = tuple(place in places for place in range(len(pair.ids)))
    return Asked(example, pair.ids, is_answer, num_cut=len(whole.ids) - len(pair.ids), pair=pair, places=places)


def _answers(model: Any, base: TaskBase, examples: Sequence[Encoded], *, may_be_none: bool) -> list[str]:
    """The likeliest answers of at most `_MOST` tokens; none, where there may be, that the first token stands for."""
    logits = _logits(model, base, examples)[0].tolist()
    found = []
    for each, rows in zip(examples, logits, strict=True):
        pair = _pair(each)
        begins, ends = np.array(rows)[list(pair.second)].T
        spans = begins[:, None] + ends[None, :]
        allowed = np.triu(np.ones_like(spans)) - np.triu(np.ones_like(spans), _MOST) > 0
        best = int(np.where(allowed, spans, -np.inf).argmax())
        begin, end = divmod(best, len(begins))
        has_none = may_be_none and sum(rows[0]) > spans[begin, end]
        text = each.example.messages[1].content
        found.append("" if has_none else text[pair.offsets[begin][0] : pair.offsets[end][1]])
    return found


def _logits(model: Any, base: TaskBase, examples: Sequence[Encoded]) -> tuple[torch.Tensor, int]:
    """Logits [pairs, tokens, 2], -inf where there is no token, and how many tokens they took."""
    ids, mask = padded(base, [each.ids for each in examples])
    found = model(input_ids=ids, attention_mask=mask)
    logits = torch.stack((found.start_logits, found.end_logits), dim=-1).float()
    return logits.masked_fill(mask[..., None] == 0, -torch.inf), int(mask.sum())
