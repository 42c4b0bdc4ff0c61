"""`/docs` and `/openapi.json`, with every asset from this server; all links are relative."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import fastapi_offline
from fastapi import APIRouter, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from pydantic.json_schema import models_json_schema
from starlette.responses import RedirectResponse, Response

from manylora.api.adapters import ImportBody, LoadBody, PatchBody, UnloadBody
from manylora.api.anthropic import CountRequest, MessagesRequest
from manylora.api.auth import current_principal
from manylora.api.canaries import CanaryBody
from manylora.api.classify import ClassifyRequest
from manylora.api.embeddings import EmbeddingRequest
from manylora.api.examples import BODIES, PARAMETERS
from manylora.api.fine_tuning_schemas import JobBody
from manylora.api.history import RollbackBody
from manylora.api.ollama import OllamaChatRequest, OllamaGenerateRequest
from manylora.api.questions import QuestionRequest
from manylora.api.rerank import RerankRequest, ScoreRequest
from manylora.api.responses import ResponseRequest
from manylora.api.schemas import ChatRequest, CompletionRequest
from manylora.api.tenants import KeyBody, TenantBody
from manylora.api.tgi import GenerateRequest
from manylora.api.tokens import DetokenizeRequest, TokenizeRequest

__all__ = ["install_docs"]

_ASSETS: Final = Path(fastapi_offline.__file__).parent / "static"
# Of routes that parse their bodies themselves.
_BODIES: Final = (
    CompletionRequest,
    ChatRequest,
    ResponseRequest,
    MessagesRequest,
    CountRequest,
    EmbeddingRequest,
    ClassifyRequest,
    ScoreRequest,
    RerankRequest,
    QuestionRequest,
    TokenizeRequest,
    DetokenizeRequest,
    GenerateRequest,
    OllamaChatRequest,
    OllamaGenerateRequest,
    ImportBody,
    PatchBody,
    LoadBody,
    UnloadBody,
    RollbackBody,
    CanaryBody,
    JobBody,
    KeyBody,
    TenantBody,
)
_KEYS: Final = {
    "key": {"type": "http", "scheme": "bearer", "description": "An API key, `ml_…`. An open server needs none."},
    "x-api-key": {
        "type": "apiKey",
        "in": "header",
        "name": "x-api-key",
        "description": "The same key, said otherwise.",
    },
}
_ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_CONTENT_POLICY: Final = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
)


def install_docs(app: FastAPI, routers: Sequence[APIRouter]) -> None:
    """Mount the documentation page and complete the schema of the routers: by bodies, keys, errors, examples."""

    async def page() -> Response:
        response = get_swagger_ui_html(
            openapi_url="openapi.json",
            title=app.title,
            swagger_js_url="docs/assets/swagger-ui-bundle.js",
            swagger_css_url="docs/assets/swagger-ui.css",
            swagger_favicon_url="docs/assets/favicon.png",
        )
        response.headers["content-security-policy"] = _CONTENT_POLICY
        return response

    async def with_slash() -> Response:
        return RedirectResponse("../docs", status_code=308)

    app.add_api_route("/docs", page, methods=["GET"], include_in_schema=False)
    app.add_api_route("/docs/", with_slash, methods=["GET"], include_in_schema=False)
    app.mount("/docs/assets", StaticFiles(directory=_ASSETS), name="docs-assets")
    app.openapi = lambda: _schema(app, routers)  # type: ignore[method-assign]


def _schema(app: FastAPI, routers: Sequence[APIRouter]) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        _, bodies = models_json_schema(
            [(each, "validation") for each in _BODIES],
            ref_template="#/components/schemas/{model}",
        )
        schema["servers"] = [{"url": "."}]  # where the schema is, so that it also holds below a proxy's path
        schema["security"] = [{name: []} for name in _KEYS]
        components = schema.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):  # of FastAPI, whose words no route uses
            schemas.pop(name, None)
        schemas.update(bodies["$defs"], Error=_ERROR)
        components["securitySchemes"] = _KEYS
        answer = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        components["responses"] = {
            "Error": {"description": "What is wrong, and what to do about it", "content": answer}
        }
        routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
        without_key = {
            f"{method} {route.path}" for route in routes if not _needs_key(route) for method in route.methods or ()
        }
        for path, operations in schema["paths"].items():
            for method, operation in operations.items():
                route = f"{method.upper()} {path}"
                _complete(operation, route, needs_key=route not in without_key)
        app.openapi_schema = schema
    return app.openapi_schema


def _needs_key(route: APIRoute) -> bool:
    """Whether the route, or anything that it depends on, asks who is calling."""
    below = [route.dependant]
    while below:
        dependant = below.pop()
        if dependant.call is current_principal:
            return True
        below += dependant.dependencies
    return False


def _complete(operation: dict[str, Any], route: str, *, needs_key: bool) -> None:
    """Say what errors look like, what the path and the body may be, and that a route asks for no key."""
    operation["responses"].pop("422", None)
    if route.partition(" ")[2].startswith("/v1/") and not route.startswith("POST /v1/messages"):
        operation["responses"]["default"] = {"$ref": "#/components/responses/Error"}
    if not needs_key:
        operation.setdefault("security", [])
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "path":
            parameter["example"] = PARAMETERS[parameter["name"]]
    if route in BODIES:
        operation["requestBody"]["content"]["application/json"]["example"] = BODIES[route]
