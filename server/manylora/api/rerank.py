"""`/v1/score` and `/v1/rerank`: how well texts fit a text, by an adapter's head or by the angle between embeddings.

An adapter of SEQ_CLS with one label reads each pair as one prompt. Whatever else is named gives each text a vector, and
a pair's score is the cosine of its two.
"""

import time
from typing import Any, ClassVar, Final, Self

import numpy as np
import numpy.typing as npt
import orjson
from fastapi import APIRouter, Request
from pydantic import Field, field_validator, model_validator
from starlette.responses import Response

from manylora.api.answers import extension
from manylora.api.auth import Caller
from manylora.api.classify import shares
from manylora.api.embeddings import of_length_one
from manylora.api.fields import RERANK_UNSUPPORTED, Unsupported, renamed
from manylora.api.json_body import documented, parse_json
from manylora.api.pairs import PairsRequest
from manylora.api.run import Asked, Run, WholeRenderer, answered
from manylora.api.schemas import MAX_INPUTS, InferenceRequest, Int, checked, parse
from manylora.api.state import ServicesDep
from manylora.api.strict import Strict
from manylora.api.translation import parted, valid
from manylora.engine.interface import Delta
from manylora.errors import InvalidRequest

__all__ = ["RerankRequest", "ScoreRequest", "router", "texts_of"]

Vector = npt.NDArray[np.float64]
router = APIRouter(tags=["inference"])
_TEI_PASSED: Final = tuple(name for name in InferenceRequest.model_fields if name != "truncate_prompt_tokens")
_TEI_NAMES: Final = {"documents": "texts", "truncate_prompt_tokens": "truncate"}


def texts_of(value: Any, *, is_list: bool) -> list[str]:
    """Texts as they are, or as the `text` of objects. Raises ValueError."""
    given = value if isinstance(value, list) else [value]
    texts = [each["text"] if isinstance(each, dict) and set(each) == {"text"} else each for each in given]
    found = [each for each in texts if isinstance(each, str)]
    if (is_list and given is not value) or not found or len(found) < len(texts):
        raise ValueError(f"must be {'' if is_list else 'a string or '}a list of strings, and not empty")
    if len(found) > MAX_INPUTS:
        raise ValueError(f"holds more than {MAX_INPUTS} texts. Send fewer.")
    return found


class RerankRequest(PairsRequest):
    """`POST /v1/rerank`, as Cohere, Jina and vLLM have it."""

    unsupported: ClassVar[Unsupported] = RERANK_UNSUPPORTED
    prompt_field: ClassVar[str] = "documents"

    query: str
    documents: list[str]
    top_n: Int | None = Field(default=None, ge=1, description="How many of the best are told; left out: all.")
    return_documents: bool | None = Field(default=None, description="Whether results have the documents' texts.")
    use_activation: bool = Field(default=True, description="false: the head's number as it is. Cosines always are.")

    @field_validator("documents", mode="plain", json_schema_input_type=list[str])
    @classmethod
    def _check_documents(cls, value: Any) -> list[str]:
        return texts_of(value, is_list=True)

    @property
    def firsts(self) -> list[str]:
        return [self.query]

    @property
    def seconds(self) -> list[str]:
        return self.documents


class ScoreRequest(PairsRequest):
    """`POST /v1/score`, as vLLM has it, under its earlier names or its later ones."""

    unsupported: ClassVar[Unsupported] = RERANK_UNSUPPORTED
    first_field: ClassVar[str] = "text_1"
    prompt_field: ClassVar[str] = "text_2"

    text_1: list[str] | None = None
    text_2: list[str] | None = None
    queries: list[str] | None = None
    documents: list[str] | None = None
    use_activation: bool = Field(default=True, description="false: the head's number as it is. Cosines always are.")

    @field_validator(
        "text_1", "text_2", "queries", "documents", mode="plain", json_schema_input_type=str | list[str] | None
    )
    @classmethod
    def _check_texts(cls, value: Any) -> list[str]:
        return texts_of(value, is_list=False)

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        for first, second in (("text_1", "queries"), ("text_2", "documents")):
            if (getattr(self, first) is None) == (getattr(self, second) is None):
                raise InvalidRequest(f"Send either '{first}' or '{second}'.", param=first)
        if len(self.firsts) not in (1, len(self.seconds)):
            raise InvalidRequest(
                f"There are {len(self.firsts)} first texts and {len(self.seconds)} second ones: send one, or as "
                "many as second ones.",
                param="text_1" if self.queries is None else "queries",
            )
        return self

    @property
    def names(self) -> dict[str, str]:
        """The later name of each field that the body has under it."""
        return {
            earlier: later
            for earlier, later in (("text_1", "queries"), ("text_2", "documents"))
            if getattr(self, later) is not None
        }

    @property
    def firsts(self) -> list[str]:
        return self.text_1 or self.queries or []

    @property
    def seconds(self) -> list[str]:
        return self.text_2 or self.documents or []


class TeiRequest(Strict):
    """`POST /rerank` in text-embeddings-inference's words."""

    query: str
    texts: list[str]
    raw_scores: bool = False
    return_text: bool = False
    truncate: bool = False

    @field_validator("texts", mode="plain", json_schema_input_type=list[str])
    @classmethod
    def _check_texts(cls, value: Any) -> list[str]:
        return texts_of(value, is_list=True)


@router.post("/v1/score", openapi_extra=documented("ScoreRequest"))
async def create_score(request: Request, caller: Caller, services: ServicesDep) -> Response:
    """How well each second text fits its first one."""

    def read(data: bytes) -> Asked:
        body = parse(ScoreRequest, data)
        return Asked(body, lambda run: ScoreAnswer(run, body), names=body.names)

    return await answered(request, caller, services, read)


@router.post("/v1/rerank", openapi_extra=documented("RerankRequest"))
async def create_reranking(request: Request, caller: Caller, services: ServicesDep) -> Response:
    """The documents in the order of how well they fit the query, each with its text unless the body says not."""

    def read(data: bytes) -> Asked:
        body = parse(RerankRequest, data)
        return Asked(body, lambda run: RerankAnswer(run, body, has_texts=body.return_documents is not False))

    return await answered(request, caller, services, read)


@router.post("/v2/rerank", openapi_extra=documented("RerankRequest"))
async def create_reranking_v2(request: Request, caller: Caller, services: ServicesDep) -> Response:
    """As `/v1/rerank`, without the documents' texts unless the body asks for them."""

    def read(data: bytes) -> Asked:
        body = parse(RerankRequest, data)
        return Asked(body, lambda run: RerankAnswer(run, body, has_texts=body.return_documents is True))

    return await answered(request, caller, services, read)


@router.post("/rerank", openapi_extra=documented("RerankRequest"))
async def rerank(request: Request, caller: Caller, services: ServicesDep) -> Response:
    """As `/v1/rerank` where the body has `documents`; in text-embeddings-inference's words where it has `texts`."""

    def read(data: bytes) -> Asked:
        raw = parse_json(data)
        if isinstance(raw, dict) and "texts" in raw:
            return _tei(raw)
        body = checked(RerankRequest, raw)
        return Asked(body, lambda run: RerankAnswer(run, body, has_texts=body.return_documents is not False))

    return await answered(request, caller, services, read)


def _tei(raw: dict[str, Any]) -> Asked:
    """What a body of text-embeddings-inference asks for. Raises InvalidRequest."""
    own, passed = parted(raw, TeiRequest, RERANK_UNSUPPORTED, _TEI_PASSED)
    asked = valid(TeiRequest, own)
    ours = {
        "adapter_id": None,
        **passed,
        "query": asked.query,
        "documents": asked.texts,
        "use_activation": not asked.raw_scores,
        "truncate_prompt_tokens": -1 if asked.truncate else None,
    }
    try:
        body = checked(RerankRequest, ours)
    except InvalidRequest as error:
        raise renamed(error, _TEI_NAMES) from None
    return Asked(body, lambda run: TeiAnswer(run, body, has_texts=asked.return_text), names=_TEI_NAMES)


class _Answer(WholeRenderer):
    """Keeps what each prompt came to: a pair's score or a text's vector. Common to what implements `run.Renderer`."""

    def __init__(self, run: Run, body: RerankRequest | ScoreRequest) -> None:
        self._run = run
        self._body = body
        self._label = body.model or body.adapter_id or run.label
        self._scores: list[float] = [0.0] * len(body.seconds)
        self._vectors: dict[int, Vector] = {}

    def add(self, choice: int, delta: Delta) -> None:
        assert delta.pooled is not None, "an input that is read has one delta"
        if delta.head is None:
            self._vectors[choice] = of_length_one(delta.pooled)
            return
        if len(delta.head.labels) != 1:
            raise InvalidRequest(
                f"The adapter's head has {len(delta.head.labels)} labels, and pairs are scored by a head of one. Ask "
                "/v1/classify, or name another adapter.",
                param="model",
            )
        [self._scores[choice]] = shares(delta.pooled, delta.head, is_activated=self._body.use_activation).tolist()

    def scores(self) -> list[float]:
        """Of each pair, in the order of the second texts."""
        if self._vectors:
            num_firsts = len(self._body.firsts)
            for number in range(len(self._scores)):
                first = self._vectors[number if num_firsts > 1 else 0]
                self._scores[number] = float(first @ self._vectors[num_firsts + number])
        return self._scores

    def _usage(self) -> dict[str, Any]:
        tokens, cached = self._run.counts.prompt_tokens, self._run.counts.cached_tokens
        return {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class ScoreAnswer(_Answer):
    """vLLM's list of scores."""

    def whole(self) -> bytes:
        data = [{"index": i, "object": "score", "score": score} for i, score in enumerate(self.scores())]
        return orjson.dumps(
            {
                "id": f"score-{self._run.id}",
                "object": "list",
                "created": int(time.time()),
                "model": self._label,
                "data": data,
                "usage": self._usage(),
                "manylora": extension(self._run),
            }
        )


class RerankAnswer(_Answer):
    """The documents' places, the best first; those of equal scores in the order in which they came."""

    def __init__(self, run: Run, body: RerankRequest, *, has_texts: bool) -> None:
        super().__init__(run, body)
        self._texts = body.documents if has_texts else None
        self._top_n = body.top_n

    def ranked(self) -> list[tuple[int, float]]:
        """Place and score of each document that is told of."""
        scores = self.scores()
        return sorted(enumerate(scores), key=lambda pair: -pair[1])[: self._top_n]

    def whole(self) -> bytes:
        results = [
            {
                "index": index,
                **({} if self._texts is None else {"document": {"text": self._texts[index]}}),
                "relevance_score": score,
            }
            for index, score in self.ranked()
        ]
        return orjson.dumps(
            {
                "id": f"rerank-{self._run.id}",
                "object": "list",
                "model": self._label,
                "results": results,
                "usage": self._usage(),
                "manylora": extension(self._run),
            }
        )


class TeiAnswer(RerankAnswer):
    """A list of places with their scores, the best first."""

    def whole(self) -> bytes:
        texts = self._texts
        return orjson.dumps(
            [
                {"index": index, **({} if texts is None else {"text": texts[index]}), "score": score}
                for index, score in self.ranked()
            ]
        )
