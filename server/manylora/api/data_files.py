"""`/v1/files`: OpenAI's routes for files of data that jobs learn from."""

from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any, Final, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from manylora.api.auth import Manager
from manylora.database.tables import MICROSECONDS
from manylora.errors import InvalidRequest
from manylora.jobs.files import DataFiles
from manylora.jobs.records import DataFile

__all__ = ["build_router"]

MAX_PAGE: Final = 10_000
_CHUNK_BYTES: Final = 2**18
_UPLOAD: Final = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "JSON lines"},
                        "purpose": {"type": "string", "enum": ["fine-tune"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer"},
                    },
                }
            }
        },
    }
}


def build_router(files: DataFiles) -> APIRouter:
    """The routes over the tenants' files."""
    router = APIRouter(tags=["fine-tuning"])

    @router.post("/v1/files", openapi_extra=_UPLOAD)
    async def create_file(request: Request, caller: Manager) -> Response:
        """Upload rows to learn from. Each is checked at once: a faulty one is a 400 that says which and why."""
        length = request.headers.get("content-length", "")
        announced = int(length) if length.isascii() and length.isdigit() else None
        kind = request.headers.get("content-type", "")
        if not kind.startswith("multipart/form-data"):
            raise InvalidRequest("Send the file as multipart/form-data, with the fields 'file' and 'purpose'.")
        return _private(_view(await files.add(caller.tenant, _stream(request), kind, announced)))

    @router.get("/v1/files")
    async def list_files(
        caller: Manager,
        purpose: str | None = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        """The caller's files, newest first unless `order` is `asc`."""
        found, has_more = await files.page(
            caller.tenant, purpose=purpose, limit=limit, after=after, is_ascending=order == "asc"
        )
        ends = {"first_id": found[0].id, "last_id": found[-1].id} if found else {"first_id": None, "last_id": None}
        return _private({"object": "list", "data": [_view(each) for each in found], **ends, "has_more": has_more})

    @router.get("/v1/files/{file_id}")
    async def get_file(file_id: str, caller: Manager) -> Response:
        """What is known of one file."""
        return _private(_view(await files.get(caller.tenant, file_id)))

    @router.get("/v1/files/{file_id}/content")
    async def get_content(file_id: str, caller: Manager) -> Response:
        """The file, byte for byte as it came in."""
        return _Content(files, caller.tenant, file_id)

    @router.delete("/v1/files/{file_id}")
    async def delete_file(file_id: str, caller: Manager) -> Response:
        """Delete a file for good; 409 while a job that has not ended needs it."""
        await files.delete(caller.tenant, file_id)
        return _private({"id": file_id, "object": "file", "deleted": True})

    return router


class _Content(Response):
    """Sends a file, which is open as long as that takes and no longer. An error comes before its status line."""

    def __init__(self, files: DataFiles, tenant: str, file_id: str) -> None:
        super().__init__()
        self._files = files
        self._tenant = tenant
        self._file_id = file_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._files.content(self._tenant, self._file_id) as (found, content):
            headers = {
                "content-disposition": f"attachment; filename*=UTF-8''{quote(found.filename, safe='')}",
                "content-length": str(found.size_bytes),
                "cache-control": "no-store",
            }
            chunks = iter(partial(content.read, _CHUNK_BYTES), b"")
            sent = StreamingResponse(chunks, media_type="application/octet-stream", headers=headers)
            await sent(scope, receive, send)


async def _stream(request: Request) -> AsyncIterator[bytes]:
    async for chunk in request.stream():
        if chunk:
            yield chunk


def _private(body: dict[str, Any]) -> Response:
    return JSONResponse(body, headers={"cache-control": "no-store"})


def _view(file: DataFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": file.created // MICROSECONDS,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "expires_at": None if file.expires is None else file.expires // MICROSECONDS,
        "manylora": {"rows": file.facts.get("num_rows"), "shape": file.facts.get("shape")},
    }
