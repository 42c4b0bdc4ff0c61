"""`/v1/embeddings`: the model's own hidden states, with an adapter or without, in the batch of everybody's requests."""

import base64
import time
from typing import Any, ClassVar, Final, Literal

import numpy as np
import numpy.typing as npt
import orjson
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from manylora.api.answers import extension
from manylora.api.auth import Caller
from manylora.api.fields import EMBEDDING_UNSUPPORTED, Unsupported
from manylora.api.inputs import PoolRequest
from manylora.api.json_body import documented, parse_json
from manylora.api.pictures import of_messages
from manylora.api.run import Asked, Run, WholeRenderer, answered
from manylora.api.schemas import Int, checked
from manylora.api.state import ServicesDep
from manylora.engine.interface import Delta, ModelInfo
from manylora.errors import InvalidRequest

__all__ = ["EmbeddingRequest", "of_length_one", "router"]

_LITTLE_ENDIAN: Final = np.dtype("<f4")
router = APIRouter(tags=["inference"])


class EmbeddingRequest(PoolRequest):
    """`POST /v1/embeddings`."""

    unsupported: ClassVar[Unsupported] = EMBEDDING_UNSUPPORTED

    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Int | None = Field(default=None, ge=1, description="To how many numbers an embedding is cut.")
    modality: Literal["text", "image"] | None = Field(
        default=None, description="What `input` holds, in infinity's words."
    )

    @property
    def has_images(self) -> bool:
        return self.modality == "image" or super().has_images

    @property
    def has_texts(self) -> bool:
        return self.modality == "text"


@router.post(
    "/v1/embeddings",
    openapi_extra=documented("EmbeddingRequest"),
)
async def create_embeddings(request: Request, caller: Caller, services: ServicesDep) -> Response:
    """One vector for each text: OpenAI's embeddings. They have length 1, unless the base's folder says otherwise."""

    def read(data: bytes) -> Asked:
        body = checked(EmbeddingRequest, of_messages(parse_json(data)))
        _check_dimensions(body.dimensions, services.engine.model)
        return Asked(body, lambda run: EmbeddingAnswer(run, body))

    return await answered(request, caller, services, read)


def _check_dimensions(wanted: int | None, model: ModelInfo) -> None:
    allowed = (*model.dimensions, model.hidden_size)
    if wanted is None or wanted in allowed:
        return
    if not model.dimensions:
        why = f"This model's embeddings have {model.hidden_size} numbers and it was not trained to have them cut."
    else:
        why = f"Embeddings are cut to {', '.join(map(str, model.dimensions))} numbers, or left whole."
    raise InvalidRequest(f"'dimensions' cannot be {wanted}. {why}", param="dimensions")


class EmbeddingAnswer(WholeRenderer):
    """A list of vectors. Each becomes JSON when it comes. Implements `run.Renderer`."""

    def __init__(self, run: Run, body: EmbeddingRequest) -> None:
        self._run = run
        self._label = body.model or body.adapter_id or run.label
        self._dimensions = body.dimensions
        self._normalizes = run.services.engine.model.normalizes
        self._is_base64 = body.encoding_format == "base64"
        self._found: list[orjson.Fragment | str | None] = [None] * run.num_choices

    def add(self, choice: int, delta: Delta) -> None:
        assert delta.pooled is not None, "a prompt that is pooled has one delta"
        vector = delta.pooled[: self._dimensions]
        if self._normalizes:
            vector = of_length_one(vector).astype(np.float32)
        if self._is_base64:
            self._found[choice] = base64.b64encode(vector.astype(_LITTLE_ENDIAN).tobytes()).decode()
        else:
            self._found[choice] = orjson.Fragment(orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY))

    def whole(self) -> bytes:
        counts = self._run.counts
        data: list[dict[str, Any]] = [
            {"object": "embedding", "index": index, "embedding": found} for index, found in enumerate(self._found)
        ]
        return orjson.dumps(
            {
                "object": "list",
                "data": data,
                "model": self._label,
                "id": f"embd-{self._run.id}",
                "created": int(time.time()),
                "usage": {
                    "prompt_tokens": counts.prompt_tokens,
                    "total_tokens": counts.prompt_tokens,
                    "prompt_tokens_details": {"cached_tokens": counts.cached_tokens},
                },
                "manylora": extension(self._run),
            }
        )


def of_length_one(vector: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """The vector over its length; one of zeros as it is."""
    wide = vector.astype(np.float64)
    length = float(np.linalg.norm(wide))
    return wide / length if length else wide
