"""`/dashboard`: one static page whose every file comes from this server, under a policy that allows nothing else.

The page itself is checked with the server each time it is opened; what it loads has the hash of all files in its
address and is kept by browsers for good. The page holds no data and needs no key: what it shows, it asks the API
for, with the visitor's key.
"""

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from manylora.errors import NotFound

__all__ = ["CONTENT_POLICY", "build_router"]

_FOLDER: Final = Path(__file__).parent / "dashboard"
_PAGE: Final = "index.html"
_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
CONTENT_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS: Final = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "vary": "accept-encoding",
}
_KEEP_CHECKING: Final = "no-cache"
_KEEP_FOR_GOOD: Final = "public, max-age=31536000, immutable"


@dataclass(frozen=True, slots=True)
class _File:
    """One file, ready to send: `packed` is it gzipped."""

    content: bytes
    packed: bytes
    media_type: str

    @classmethod
    def of(cls, name: str, content: bytes) -> "_File":
        return cls(content, gzip.compress(content, mtime=0), _TYPES[Path(name).suffix])

    def response(self, request: Request, headers: Mapping[str, str]) -> Response:
        sent = {**_HEADERS, **headers}
        if "gzip" in request.headers.get("accept-encoding", ""):
            return Response(self.packed, headers={**sent, "content-encoding": "gzip"}, media_type=self.media_type)
        return Response(self.content, headers=sent, media_type=self.media_type)


def build_router(root_path: str = "") -> APIRouter:
    """`GET /dashboard` and the files under it, read once, here. `GET /` leads there, below a proxy's `root_path`."""
    contents = _read(_FOLDER)
    digest = _digest(contents)
    page = _File.of(_PAGE, contents.pop(_PAGE).replace(b'"assets/', f'"dashboard/assets/{digest}/'.encode()))
    assets = {name: _File.of(name, content) for name, content in contents.items()}
    tag = f'"{digest}"'
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def start() -> Response:
        return RedirectResponse(f"{root_path}/dashboard" if root_path else "dashboard")

    @router.get("/dashboard")
    async def dashboard(request: Request) -> Response:
        headers = {"content-security-policy": CONTENT_POLICY, "cache-control": _KEEP_CHECKING, "etag": tag}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return page.response(request, headers)

    @router.get("/dashboard/")
    async def with_slash() -> Response:
        return RedirectResponse("../dashboard", status_code=308)

    @router.get("/dashboard/assets/{asked_digest}/{name:path}")
    async def asset(request: Request, asked_digest: str, name: str) -> Response:
        file = assets.get(name) if asked_digest == digest else None
        if file is None:
            raise NotFound("The dashboard has no such file. Reload the page.")
        headers = {"content-security-policy": CONTENT_POLICY, "cache-control": _KEEP_FOR_GOOD}
        return file.response(request, headers)

    return router


def _read(folder: Path) -> dict[str, bytes]:
    """Every file of a servable type by its path inside `folder`."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in _TYPES
    }


def _digest(contents: Mapping[str, bytes]) -> str:
    total = hashlib.sha256()
    for name, content in contents.items():
        total.update(f"{name}\0{len(content)}\0".encode() + content)
    return total.hexdigest()[:16]
