"""Small differences between clients: those that make no difference to an answer, and those that have to."""

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from manylora.api.errors import error_response
from manylora.errors import InvalidRequest, UnsupportedEncoding, quoted

__all__ = ["AnyMethodAndEncoding", "CanonicalPath", "is_json", "require_json"]

# Pages whose links are relative to them: a slash more would break those, so they redirect.
_PAGES = frozenset({"/", "/dashboard/", "/docs/"})


def is_json(request: Request) -> bool:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"


def require_json(request: Request) -> None:
    """A form of another site cannot declare its body so. Raises InvalidRequest."""
    if not is_json(request):
        raise InvalidRequest("Send the body as JSON, with the header 'content-type: application/json'.")


class CanonicalPath:
    """Takes a proxy's path prefix and a trailing slash off the path, for everything inside."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self.app = app
        self._prefix = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            if self._prefix and (path == self._prefix or path.startswith(f"{self._prefix}/")):
                path = path[len(self._prefix) :] or "/"
            if path.endswith("/") and path not in _PAGES:
                path = path[:-1]
            if path != scope["path"]:
                scope = {**scope, "path": path, "raw_path": path.encode()}
        await self.app(scope, receive, send)


class AnyMethodAndEncoding:
    """Answers HEAD wherever GET is answered, and refuses bodies that are encoded."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        encoding = Headers(scope=scope).get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            error = UnsupportedEncoding(f"Send the body as it is, not with content-encoding '{quoted(encoding)}'.")
            scope["manylora.log"]["code"] = error.code
            await error_response(error)(scope, receive, send)
        elif scope["method"] == "HEAD":
            await self.app({**scope, "method": "GET"}, receive, _without_bodies(send))
        else:
            await self.app(scope, receive, send)


def _without_bodies(send: Send) -> Send:
    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return send_head
