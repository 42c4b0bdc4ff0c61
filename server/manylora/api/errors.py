"""The one place where an exception becomes an HTTP answer: `{"error": {message, type, param, code}}`."""

import math
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.responses import Response

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

__all__ = ["INTERNAL_ERROR", "error_response", "install_error_handlers", "invalid_from"]

_log = get_logger("manylora.api")

# What a caller is told of an exception that nobody foresaw: nothing of its inside.
INTERNAL_ERROR = ManyloraError("The server failed to answer this request. The log has the details.")


def error_response(error: ManyloraError, *, headers: dict[str, str] | None = None) -> Response:
    """The answer for `error`, with `Retry-After` in whole seconds where the error says when to come back."""
    sent = dict(headers or {})
    if isinstance(error, RateLimited | Unavailable):
        sent["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    return Response(error_json(error), error.status, headers=sent, media_type="application/json")


def error_json(error: ManyloraError) -> bytes:
    return orjson.dumps({"error": error.body()})


def invalid_from(errors: list[ErrorDetails]) -> InvalidRequest:
    """Pydantic's findings as one InvalidRequest about the first of them; an unknown field is UnsupportedField."""
    unknown = next((e for e in errors if e["type"] == "extra_forbidden"), None)
    if unknown is not None:
        return unsupported_field(field_path(unknown["loc"]))
    first = errors[0]
    where = quoted(field_path(first["loc"]))  # a key of an object is the caller's to choose
    if first["type"] == "missing":
        return InvalidRequest(f"The field '{where}' is required.", param=where)
    text = first["msg"].removeprefix("Value error, ")
    return InvalidRequest(f"{where}: {text}" if where else text, param=where or None)


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
    return error_response(error, headers=headers)


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
    return error_response(known, headers=dict(error.headers or {}))


def install_error_handlers(app: FastAPI) -> None:
    """Map every foreseen error; what is left is caught by `api.middleware.RequestContext`."""
    app.add_exception_handler(ManyloraError, _on_manylora_error)
    app.add_exception_handler(RequestValidationError, _on_fastapi_validation)
    app.add_exception_handler(HTTPException, _on_http_exception)
