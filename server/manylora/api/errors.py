"""The one place where an exception becomes an HTTP answer: `{"error": {message, type, param, code}}`.

Routes of another API than OpenAI's answer in that API's words (`ERROR_BODIES`), whoever finds the fault: the layers
around the routes, the check of the key, the route itself.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from manylora.api.fields import unsupported_field
from manylora.errors import (
    DatabaseUnavailable,
    InvalidRequest,
    ManyloraError,
    MethodNotAllowed,
    NotFound,
    RateLimited,
    SequenceFailed,
    StorageFull,
    StoreUnavailable,
    Unavailable,
    quoted,
)
from manylora.log import get_logger

__all__ = [
    "ERROR_BODIES",
    "INTERNAL_ERROR",
    "anthropic_error",
    "error_json",
    "error_response",
    "install_error_handlers",
    "invalid_from",
    "ollama_error",
    "tgi_error",
]

_log = get_logger("manylora.api")
# What Pydantic puts behind the place of a field that may be of several types: the type that it tried.
_TYPE: Final = re.compile(r"bool|str|int|float|(?:dict|list|literal)\[.*\]")

# What a caller is told of an exception that nobody foresaw: nothing of its inside.
INTERNAL_ERROR = ManyloraError("The server failed to answer this request. The log has the details.")


def error_response(
    error: ManyloraError, scope: Scope | None = None, *, headers: dict[str, str] | None = None
) -> Response:
    """The answer for `error`, with `Retry-After` in whole seconds where the error says when to come back.

    `scope` is the request's, where there is one: its path says in which API's words it is to be told.
    """
    sent = dict(headers or {})
    if isinstance(error, RateLimited | Unavailable):
        sent["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    return Response(error_json(error, scope), error.status, headers=sent, media_type="application/json")


def error_json(error: ManyloraError, scope: Scope | None = None) -> bytes:
    """The body that tells of `error` on the route of this scope."""
    if scope is None:
        return orjson.dumps(_openai(error))
    asked = f"{scope.get('method', '')} {scope.get('path', '')}"
    body_of = next((each for prefix, each in ERROR_BODIES.items() if _is_below(asked, prefix)), _openai)
    return orjson.dumps(body_of(error))


def _is_below(asked: str, prefix: str) -> bool:
    """Whether a request, `GET /a/b`, is for what is below `/a`. A prefix with a method is that request alone."""
    path = asked.partition(" ")[2]
    return prefix in (asked, path) or path.startswith(f"{prefix}/")


def _openai(error: ManyloraError) -> dict[str, Any]:
    return {"error": error.body()}


def tgi_error(error: ManyloraError) -> dict[str, Any]:
    """An error's body as TGI sends it; its clients know three types, and go by the status where there is another."""
    return {"error": error.message, "error_type": _TGI_TYPES.get(error.status, error.code)}


def ollama_error(error: ManyloraError) -> dict[str, Any]:
    return {"error": error.message}


def anthropic_error(error: ManyloraError) -> dict[str, Any]:
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    message, place = error.message, error.param
    is_said = place is None or f"'{place[:_TELLING]}" in message or message.startswith(f"{place}:")
    if place and not is_said:  # there is no other place for it
        message = f"{place}: {message}"
    return {"type": "error", "error": {"type": kind, "message": message}}


_TELLING: Final = 40  # characters of a place: a message may quote less of it than `param` holds
_ANTHROPIC_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_TGI_TYPES: Final = {
    **dict.fromkeys((400, 413, 415, 422), "validation"),
    **dict.fromkeys((429, 503), "overloaded"),
    500: "generation",
}

ErrorBody: TypeAlias = Callable[[ManyloraError], dict[str, Any]]
"""From an error to the JSON that tells of it."""

ERROR_BODIES: Final[Mapping[str, ErrorBody]] = {
    "/api": ollama_error,
    "/v1/messages": anthropic_error,
    **dict.fromkeys(("/generate", "/generate_stream", "/info", "POST /"), tgi_error),
}
"""Of the routes that do not speak as OpenAI does, by the beginning of their path."""


def invalid_from(errors: Sequence[ErrorDetails], *where: int | str) -> InvalidRequest:
    """Pydantic's findings as one InvalidRequest about the first of them; an unknown field is UnsupportedField.

    `where`: the place of what was checked.
    """
    unknown = next((e for e in errors if e["type"] == "extra_forbidden"), None)
    if unknown is not None:
        return unsupported_field(field_path((*where, *unknown["loc"])))
    first = errors[0]
    # A key of an object is the caller's to choose.
    place = quoted(field_path((*where, *_without_types(first["loc"]))))
    if first["type"] == "missing":
        return InvalidRequest(f"The field '{place}' is required.", param=place)
    text = first["msg"].removeprefix("Value error, ")
    return InvalidRequest(f"{place}: {text}" if place else text, param=place or None)


def _without_types(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The place of a field that may be of several types, without the type that was tried."""
    return loc[:-1] if len(loc) > 1 and isinstance(loc[-1], str) and _TYPE.fullmatch(loc[-1]) else loc


def field_path(loc: tuple[int | str, ...]) -> str:
    """`("messages", 0, "content")` as `messages[0].content`."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


async def _on_manylora_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ManyloraError)
    if error.status >= 500 and not isinstance(error, Unavailable | SequenceFailed):  # which the engine has logged
        _log.error("request_failed", error=error.message, code=error.code, exc_info=error)
    elif isinstance(error, DatabaseUnavailable | StoreUnavailable | StorageFull):
        _log.error("request_failed", error=error.message, code=error.code)
    request.scope.setdefault("manylora.log", {})["code"] = error.code
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else None
    return error_response(error, request.scope, headers=headers)


async def _on_fastapi_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    details: list[Any] = [{**e, "loc": _without_place(e["loc"])} for e in error.errors()]
    return await _on_manylora_error(request, invalid_from(details))


def _without_place(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """FastAPI puts `body`, `query`, … in front of the field."""
    return loc[1:] if loc and loc[0] in ("body", "query", "path", "header", "cookie") else loc


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method, quoted(request.scope["path"])
    known: ManyloraError
    if error.status_code == 404:
        known = NotFound(f"There is no route {method} {path}. See /docs.")
    elif error.status_code == 405:
        known = MethodNotAllowed(f"{path} does not take {method}. See /docs.")
    elif error.status_code < 500:
        known = InvalidRequest(str(error.detail))
    else:
        known = INTERNAL_ERROR
    request.scope.setdefault("manylora.log", {})["code"] = known.code
    return error_response(known, request.scope, headers=dict(error.headers or {}))


def install_error_handlers(app: FastAPI) -> None:
    """Map every foreseen error; what is left is caught by `api.middleware.RequestContext`."""
    app.add_exception_handler(ManyloraError, _on_manylora_error)
    app.add_exception_handler(RequestValidationError, _on_fastapi_validation)
    app.add_exception_handler(HTTPException, _on_http_exception)
