"""`/docs` and `/openapi.json`, with every asset from this server; all links are relative."""

from pathlib import Path
from typing import Any, Final

import fastapi_offline
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.staticfiles import StaticFiles
from pydantic.json_schema import models_json_schema
from starlette.responses import RedirectResponse, Response

from manylora.api.anthropic import CountRequest, MessagesRequest
from manylora.api.classify import ClassifyRequest
from manylora.api.embeddings import EmbeddingRequest
from manylora.api.ollama import OllamaChatRequest, OllamaGenerateRequest
from manylora.api.responses import ResponseRequest
from manylora.api.schemas import ChatRequest, CompletionRequest
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
    TokenizeRequest,
    DetokenizeRequest,
    GenerateRequest,
    OllamaChatRequest,
    OllamaGenerateRequest,
)
_CONTENT_POLICY: Final = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
)


def install_docs(app: FastAPI) -> None:
    """Mount the documentation page and complete the schema by the bodies that routes parse themselves."""

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
    app.openapi = lambda: _schema(app)  # type: ignore[method-assign]


def _schema(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        _, bodies = models_json_schema(
            [(each, "validation") for each in _BODIES],
            ref_template="#/components/schemas/{model}",
        )
        schema["servers"] = [{"url": "."}]  # where the schema is, so that it also holds below a proxy's path
        schema.setdefault("components", {}).setdefault("schemas", {}).update(bodies["$defs"])
        app.openapi_schema = schema
    return app.openapi_schema
