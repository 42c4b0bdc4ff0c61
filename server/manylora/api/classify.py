"""`/v1/classify` and `/classify`: scores of an adapter's labels, as vLLM and text-embeddings-inference give them."""

import time
from abc import abstractmethod
from collections.abc import AsyncGenerator, Sequence
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import orjson
from fastapi import APIRouter, Request
from pydantic import Field, field_validator
from starlette.responses import Response

from manylora.api.answers import extension
from manylora.api.auth import Caller
from manylora.api.fields import CLASSIFY_UNSUPPORTED, Unsupported, renamed
from manylora.api.inputs import InputsRequest
from manylora.api.json_body import documented, parse_json
from manylora.api.lanes import PYTHON, beside_loop
from manylora.api.pictures import of_messages
from manylora.api.run import Asked, Deltas, Run, WholeRenderer, answered
from manylora.api.schemas import InferenceRequest, checked
from manylora.api.state import ServicesDep
from manylora.api.strict import Strict
from manylora.api.translation import parted, valid
from manylora.engine.interface import Delta, Head
from manylora.errors import InvalidRequest

__all__ = ["ClassifyRequest", "router", "shares"]

Scores = npt.NDArray[np.float32]
router = APIRouter(tags=["inference"])
MAX_LABELS_TOLD: Final = 262_144
# Of one input, what is put into JSON in a millisecond.
_INLINE_LABELS: Final = 512
# What an input is cut to is said by `truncate` there.
_TEI_PASSED: Final = tuple(name for name in InferenceRequest.model_fields if name != "truncate_prompt_tokens")
_TEI_NAMES: Final = {"input": "inputs", "truncate_prompt_tokens": "truncate"}


class ClassifyRequest(InputsRequest):
    """`POST /v1/classify`."""

    unsupported: ClassVar[Unsupported] = CLASSIFY_UNSUPPORTED

    reads_head: ClassVar[bool] = True

    threshold: float | None = Field(
        default=None, ge=0, le=1, description="Of a head of which several labels may hold: from which share one does."
    )
    use_activation: bool = Field(default=True, description="Shares of one; false: the head's scores as they are.")


class TeiRequest(Strict):
    """`POST /classify` in text-embeddings-inference's words."""

    inputs: str | list[str]
    truncate: bool = False
    truncation_direction: str = "right"
    raw_scores: bool = False

    @field_validator("inputs", mode="plain", json_schema_input_type=str | list[str])
    @classmethod
    def _check_inputs(cls, value: Any) -> Any:
        texts = [value] if isinstance(value, str) else value
        if not (isinstance(texts, list) and texts and all(isinstance(each, str) for each in texts)):
            raise ValueError("must be a string or a list of strings, and not empty")
        return value

    @field_validator("truncation_direction")
    @classmethod
    def _check_direction(cls, value: str) -> str:
        if value.lower() != "right":
            raise ValueError("inputs are cut on the right; leave it out")
        return value


@router.post("/v1/classify", openapi_extra=documented("ClassifyRequest"))
async def create_classification(request: Request, caller: Caller, services: ServicesDep) -> Response:
    """The label of each text, and every label's share."""

    def read(data: bytes) -> Asked:
        body = checked(ClassifyRequest, of_messages(parse_json(data)))
        return Asked(body, lambda run: ClassifyAnswer(run, body))

    return await answered(request, caller, services, read)


@router.post("/classify", openapi_extra=documented("ClassifyRequest"))
async def classify(request: Request, caller: Caller, services: ServicesDep) -> Response:
    """As `/v1/classify` where the body has `input`; in text-embeddings-inference's words where it has `inputs`."""

    def read(data: bytes) -> Asked:
        raw = parse_json(data)
        if isinstance(raw, dict) and "inputs" in raw:
            return _tei(raw)
        body = checked(ClassifyRequest, of_messages(raw))
        return Asked(body, lambda run: ClassifyAnswer(run, body))

    return await answered(request, caller, services, read)


def _tei(raw: dict[str, Any]) -> Asked:
    """What a body of text-embeddings-inference asks for. Raises InvalidRequest."""
    own, passed = parted(raw, TeiRequest, CLASSIFY_UNSUPPORTED, _TEI_PASSED)
    asked = valid(TeiRequest, own)
    ours = {
        "adapter_id": None,
        **passed,
        "input": asked.inputs,
        "use_activation": not asked.raw_scores,
        "truncate_prompt_tokens": -1 if asked.truncate else None,
    }
    try:
        body = checked(ClassifyRequest, ours)
    except InvalidRequest as error:
        raise renamed(error, _TEI_NAMES) from None
    is_single = isinstance(asked.inputs, str)
    return Asked(body, lambda run: TeiAnswer(run, body, is_single=is_single), names=_TEI_NAMES)


def shares(scores: Scores, head: Head, *, is_activated: bool = True) -> npt.NDArray[np.float64]:
    """What the scores [..., labels] come to: shares of one, each label's own, or numbers as they are; float64."""
    wide = scores.astype(np.float64)
    if not is_activated or head.problem == "regression":
        return wide
    if head.problem == "multi" or len(head.labels) == 1:
        return 1.0 / (1.0 + np.exp(-wide))
    powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
    found: npt.NDArray[np.float64] = powers / powers.sum(axis=-1, keepdims=True)
    return found


class _Answer(WholeRenderer):
    """Puts the scores of each input into JSON as they come. Implements what is common of `run.Renderer`."""

    inputs_field = "input"

    def __init__(self, run: Run, body: ClassifyRequest) -> None:
        self._run = run
        self._label = body.model or body.adapter_id or run.services.engine.model.name
        self._is_activated = body.use_activation
        self._threshold = 0.5 if body.threshold is None else body.threshold
        self._asked_threshold = body.threshold is not None
        self._checked: Head | None = None
        self._entries: list[orjson.Fragment | None] = [None] * run.num_choices

    def arranged(self, deltas: Deltas) -> Deltas:
        return self._told(deltas)

    async def _told(self, deltas: Deltas) -> AsyncGenerator[tuple[int, Delta], None]:
        """The deltas as they are; what they say is put into JSON on the way, beside the event loop where it is much."""
        async for choice, delta in deltas:
            assert delta.pooled is not None, "an input whose head was asked for has one delta"
            assert delta.head is not None
            self._check(delta.head)
            asked = choice, delta.pooled, delta.head
            is_small = _num_told(len(self._run.prompts[choice].ids), delta.head) <= _INLINE_LABELS
            self._entries[choice] = self._json(*asked) if is_small else await beside_loop(PYTHON, self._json, *asked)
            yield choice, delta

    def _check(self, head: Head) -> None:
        """Raises InvalidRequest."""
        if head is self._checked:  # of all inputs: a request has one adapter
            return
        self._checked = head
        if head.task == "QUESTION_ANS":
            raise InvalidRequest(
                "The adapter answers questions and has no labels. Ask /v1/question-answering.", param="model"
            )
        if self._asked_threshold and head.problem != "multi":
            raise InvalidRequest(
                "'threshold' is for adapters of which several labels may hold at once. Leave it out.", param="threshold"
            )
        num_told = sum(_num_told(len(prompt.ids), head) for prompt in self._run.prompts)
        if num_told > MAX_LABELS_TOLD:
            raise InvalidRequest(
                f"The answer would have {num_told} labels, and has at most {MAX_LABELS_TOLD}. Send fewer inputs.",
                param=self.inputs_field,
            )

    def _json(self, choice: int, scores: Scores, head: Head) -> orjson.Fragment:
        return orjson.Fragment(orjson.dumps(self._entry(choice, scores, head)))

    @abstractmethod
    def _entry(self, index: int, scores: Scores, head: Head) -> Any:
        """What is told of one input."""

    def add(self, choice: int, delta: Delta) -> None:
        """Nothing to do: an answer is no text, and was taken in before it came here."""

    def _shares(self, scores: Scores, head: Head) -> npt.NDArray[np.float64]:
        """The scores as the body asks for them."""
        return shares(scores, head, is_activated=self._is_activated)


def _num_told(num_tokens: int, head: Head) -> int:
    """Labels that are told of an input of so many tokens: one of each token, or every one of a text."""
    return num_tokens if head.task == "TOKEN_CLS" else len(head.labels)


class ClassifyAnswer(_Answer):
    """vLLM's answer, with `labels` beside it: every label's name and share."""

    def whole(self) -> bytes:
        counts = self._run.counts
        return orjson.dumps(
            {
                "id": f"classify-{self._run.id}",
                "object": "list",
                "created": int(time.time()),
                "model": self._label,
                "data": self._entries,
                "usage": {
                    "prompt_tokens": counts.prompt_tokens,
                    "total_tokens": counts.prompt_tokens,
                    "completion_tokens": 0,
                    "prompt_tokens_details": {"cached_tokens": counts.cached_tokens},
                },
                "manylora": extension(self._run),
            }
        )

    def _entry(self, index: int, scores: Scores, head: Head) -> dict[str, Any]:
        found = self._shares(scores, head)
        named: dict[str, Any] = {"index": index, "num_classes": len(head.labels)}
        if found.ndim > 1:
            prompt = self._run.prompts[index].ids
            return named | {"tokens": _tokens(found, head, prompt, self._run), "label": None, "probs": None}
        ranked = sorted(zip(head.labels, found.tolist(), strict=True), key=lambda pair: -pair[1])
        named |= {"label": ranked[0][0], "probs": found.tolist()}
        named["labels"] = [{"label": label, "score": score} for label, score in ranked]
        if head.problem == "multi":
            share_of = dict(zip(head.labels, shares(scores, head).tolist(), strict=True))
            named["chosen"] = [label for label, _ in ranked if share_of[label] >= self._threshold]
        return named


def _tokens(found: npt.NDArray[np.float64], head: Head, ids: Sequence[int], run: Run) -> list[dict[str, Any]]:
    """The likeliest label of each token."""
    best = found.argmax(axis=-1)
    token_name = run.codec.token_name
    return [
        {
            "index": place,
            "word": token_name(ids[place]),
            "entity": head.labels[label],
            "score": float(found[place, label]),
        }
        for place, label in enumerate(best.tolist())
    ]


class TeiAnswer(_Answer):
    """A list of labels with their scores for each input, the best first; for a single text its list alone."""

    inputs_field = "inputs"

    def __init__(self, run: Run, body: ClassifyRequest, *, is_single: bool) -> None:
        super().__init__(run, body)
        self._is_single = is_single

    def whole(self) -> bytes:
        return orjson.dumps(self._entries[0] if self._is_single else self._entries)

    def _entry(self, index: int, scores: Scores, head: Head) -> list[dict[str, Any]]:
        found = self._shares(scores, head)
        if found.ndim > 1:
            return _tokens(found, head, self._run.prompts[index].ids, self._run)
        ranked = sorted(zip(head.labels, found.tolist(), strict=True), key=lambda pair: -pair[1])
        return [{"label": label, "score": score} for label, score in ranked]
