"""`/ping` and `/invocations`, what Amazon SageMaker asks of a container. A body is read as what it looks like."""

from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from manylora.api import openai, ops, tgi
from manylora.api.auth import Caller
from manylora.api.json_body import documented, parse_json
from manylora.api.run import Asked, answered
from manylora.api.state import ServicesDep
from manylora.api.tgi_answers import Shape
from manylora.errors import InvalidRequest

__all__ = ["ADAPTER_HEADER", "router"]

ADAPTER_HEADER: Final = "x-amzn-sagemaker-adapter-identifier"
_BODY: Final = documented("ChatRequest", "CompletionRequest", "GenerateRequest")

router = APIRouter(tags=["SageMaker"])


@router.get("/ping")
async def ping(services: ServicesDep) -> dict[str, str]:
    """The server is ready; 503 otherwise."""
    return await ops.ready(services)


@router.post("/invocations", openapi_extra=_BODY)
async def invoke(request: Request, caller: Caller, services: ServicesDep) -> Response:
    """A chat where the body has `messages`, a completion where it has `prompt`, TGI's request where it has `inputs`.

    The header `X-Amzn-SageMaker-Adapter-Identifier`, which invocations of an adapter's inference component carry, names
    the adapter.
    """
    adapter = request.headers.get(ADAPTER_HEADER)
    return await answered(request, caller, services, lambda data: _asked(data, adapter))


def _asked(data: bytes, adapter: str | None) -> Asked:
    raw = parse_json(data)
    kinds = [name for name in ("messages", "prompt", "inputs") if isinstance(raw, dict) and name in raw]
    if len(kinds) != 1:
        raise InvalidRequest("Send one of 'messages' (a chat), 'prompt' (a completion) and 'inputs' (as TGI has it).")
    if kinds == ["inputs"]:
        parameters = raw.get("parameters") or {}
        if adapter is not None and isinstance(parameters, dict):
            raw["parameters"] = _with_adapter(parameters, adapter)
        return tgi.asked_by(raw, shape=Shape(is_listed=True), streams=None)
    raw = {"adapter_id": None, **raw} if adapter is None else _with_adapter(raw, adapter)
    return openai.chat(raw) if kinds == ["messages"] else openai.completion(raw)


def _with_adapter(fields: dict[str, Any], adapter: str) -> dict[str, Any]:
    """Raises InvalidRequest where the body names another one."""
    if fields.get("adapter_id") not in (None, adapter):
        raise InvalidRequest(
            "The body's 'adapter_id' and the header X-Amzn-SageMaker-Adapter-Identifier name different adapters.",
            param="adapter_id",
        )
    return {**fields, "adapter_id": adapter}
