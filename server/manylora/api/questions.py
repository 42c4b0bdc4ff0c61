"""`/v1/question-answering`: the part of a text that answers a question, by an adapter's head of QUESTION_ANS."""

import time
from collections.abc import AsyncGenerator
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import orjson
from fastapi import APIRouter, Request
from pydantic import Field, field_validator
from starlette.responses import Response

from manylora.api.answers import extension
from manylora.api.auth import Caller
from manylora.api.json_body import documented
from manylora.api.lanes import PYTHON, beside_loop
from manylora.api.pairs import PairsRequest
from manylora.api.rerank import texts_of
from manylora.api.run import Asked, Deltas, Run, WholeRenderer, answered
from manylora.api.schemas import Int, parse
from manylora.api.state import ServicesDep
from manylora.engine.interface import Delta, EncodedPair

__all__ = ["Answer", "QuestionRequest", "best_answers", "router"]

MAX_ANSWER_TOKENS: Final = 64
MAX_ANSWERS: Final = 100
# Of one text, whose answers are found in a millisecond.
_INLINE_TOKENS: Final = 512

Scores = npt.NDArray[np.float32]
Answer = dict[str, Any]
router = APIRouter(tags=["inference"])


class QuestionRequest(PairsRequest):
    """`POST /v1/question-answering`, with the fields of transformers' pipeline."""

    first_field: ClassVar[str] = "question"
    prompt_field: ClassVar[str] = "context"
    pair_task: ClassVar[str] = "QUESTION_ANS"
    needs_head: ClassVar[bool] = True
    has_types: ClassVar[bool] = False  # PEFT's class of the task keeps them to itself, in training as well

    question: str
    context: list[str]
    top_k: Int = Field(default=1, ge=1, le=MAX_ANSWERS, description="How many answers are told of each text.")
    max_answer_len: Int = Field(default=15, ge=1, le=MAX_ANSWER_TOKENS, description="Tokens of the longest answer.")
    handle_impossible_answer: bool = Field(default=False, description="Whether there may be none: an empty answer.")

    @field_validator("context", mode="plain", json_schema_input_type=str | list[str])
    @classmethod
    def _check_context(cls, value: Any) -> list[str]:
        return texts_of(value, is_list=False)

    @property
    def firsts(self) -> list[str]:
        return [self.question]

    @property
    def seconds(self) -> list[str]:
        return self.context


@router.post("/v1/question-answering", openapi_extra=documented("QuestionRequest"))
async def answer_question(request: Request, caller: Caller, services: ServicesDep) -> Response:
    """Of each text the parts that answer the question best."""

    def read(data: bytes) -> Asked:
        body = parse(QuestionRequest, data)
        return Asked(body, lambda run: QuestionAnswer(run, body))

    return await answered(request, caller, services, read)


def best_answers(
    scores: Scores, pair: EncodedPair, text: str, *, top_k: int, max_len: int, may_be_none: bool, has_first: bool
) -> list[Answer]:
    """The answers that transformers' pipeline finds, the best first.

    `scores` [tokens, 2] say of each token of the pair whether an answer begins or ends there. An answer is a run of at
    most `max_len` tokens of the second text, its score the product of its ends' shares. With `has_first` the first
    token takes part in the shares: it stands for no answer, which is told of where there `may_be_none`.
    """
    places = [*([0] if has_first and pair.second.start else []), *pair.second]
    wide = scores[places].astype(np.float64)
    powers = np.exp(wide - wide.max(axis=0, keepdims=True))
    shares = powers / powers.sum(axis=0, keepdims=True)
    first = len(places) - len(pair.second)
    begins, ends = shares[first:, 0], shares[first:, 1]
    count = len(begins)
    padded = np.concatenate((ends, np.zeros(max_len)))
    spans = begins[:, None] * np.lib.stride_tricks.sliding_window_view(padded, max_len)[:count]
    flat = spans.reshape(-1)
    kept = np.argpartition(-flat, top_k - 1)[:top_k] if top_k < len(flat) else np.arange(len(flat))
    found: list[Answer] = []
    for number in kept.tolist():
        start, length = divmod(number, max_len)
        if start + length < count:  # else it would end behind the text
            begin, end = pair.offsets[start][0], pair.offsets[start + length][1]
            found.append({"answer": text[begin:end], "score": float(flat[number]), "start": begin, "end": end})
    if may_be_none and first:
        found.append({"answer": "", "score": float(shares[0, 0] * shares[0, 1]), "start": 0, "end": 0})
    return sorted(found, key=lambda each: (-each["score"], each["start"], each["end"]))[:top_k]


class QuestionAnswer(WholeRenderer):
    """A list of answers for each text. Implements `run.Renderer`."""

    def __init__(self, run: Run, body: QuestionRequest) -> None:
        self._run = run
        self._body = body
        self._label = body.model or body.adapter_id or run.label
        self._found: list[list[Answer]] = [[] for _ in body.context]

    def arranged(self, deltas: Deltas) -> Deltas:
        return self._told(deltas)

    async def _told(self, deltas: Deltas) -> AsyncGenerator[tuple[int, Delta], None]:
        """The deltas as they are; what they say is found on the way, beside the event loop where that takes long."""
        async for choice, delta in deltas:
            assert delta.pooled is not None, "a pair has one delta"
            is_short = len(delta.pooled) <= _INLINE_TOKENS
            asked = choice, delta.pooled
            self._found[choice] = (
                self._answers(*asked) if is_short else await beside_loop(PYTHON, self._answers, *asked)
            )
            yield choice, delta

    def _answers(self, choice: int, scores: Scores) -> list[Answer]:
        pair, body = self._run.prompts[choice].pair, self._body
        assert pair is not None, "each prompt is a question with a text"
        return best_answers(
            scores,
            pair,
            body.context[choice],
            top_k=body.top_k,
            max_len=body.max_answer_len,
            may_be_none=body.handle_impossible_answer,
            has_first=body.has_special_tokens,
        )

    def add(self, choice: int, delta: Delta) -> None:
        """Nothing: what a delta says is taken in on its way here."""

    def whole(self) -> bytes:
        counts = self._run.counts
        return orjson.dumps(
            {
                "id": f"answers-{self._run.id}",
                "object": "list",
                "created": int(time.time()),
                "model": self._label,
                "data": [{"index": index, "answers": found} for index, found in enumerate(self._found)],
                "usage": {"prompt_tokens": counts.prompt_tokens, "total_tokens": counts.prompt_tokens},
                "manylora": extension(self._run),
            }
        )
