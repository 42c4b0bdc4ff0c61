"""Tenants' files of data: received, checked row by row, kept in the store, and gone when their time has come.

A row is there before its bytes and after them, so that whatever a crash leaves can be found and removed.
"""

import asyncio
import hashlib
import math
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, Final, TypeVar
from weakref import WeakValueDictionary

from sqlalchemy import Select, delete, func, or_, select, tuple_
from sqlalchemy.orm import Session, defer

from manylora.catalog.multipart import Form, read_form
from manylora.catalog.store import Store
from manylora.children import Helper
from manylora.database.database import Database
from manylora.database.tables import MICROSECONDS, FileRow, JobRow, TenantRow
from manylora.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    QuotaExceeded,
    RateLimited,
    StoreUnavailable,
    TooLarge,
    UnsupportedField,
    quoted,
)
from manylora.faults import file_errors
from manylora.files import clear_folder, remove_tree
from manylora.jobs.records import FINE_TUNE, LIVE, RESULTS, DataFile, data_file, new_file_id, now_in
from manylora.tenants.limits import limits_in

__all__ = ["DataFiles", "find_file", "find_needed_file"]

MAX_FILENAME: Final = 255  # characters
MAX_FILES: Final = 10_000  # of one tenant, without those that jobs have made
MAX_TRANSFERS: Final = 4  # uploads and downloads of one tenant at a time
MIN_EXPIRY_S: Final = 3600
MAX_EXPIRY_S: Final = 2_592_000
_DAY_S: Final = 86_400
_PART: Final = "file"
_FIELDS: Final = frozenset({"purpose", "expires_after[anchor]", "expires_after[seconds]"})
_SUFFIXES: Final = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_CHECKER: Final = "manylora.jobs.check_process"
# What was begun so long ago and is not whole has been left by a crash.
_ABANDONED_US: Final = 3_600 * MICROSECONDS
_SWEPT_AT_ONCE: Final = 100
_NUM_MOVED_AT_ONCE: Final = 4
_QUOTA_RETRY_S: Final = 60.0
_T = TypeVar("_T")


class DataFiles:
    """Used on the event loop. `max_bytes` bounds a file, `kept_days` how long one stays that does not say.

    Bytes move to the store and back on threads of its own, so that a slow store keeps nobody from the database, and a
    tenant's files are examined one after the other, so that those of another wait for one of them at the most.
    """

    def __init__(self, database: Database, store: Store, scratch: Path, *, max_bytes: int, kept_days: float) -> None:
        self._database = database
        self._store = store
        self._scratch = scratch
        self._max_bytes = max_bytes
        self._kept_us = int(kept_days * _DAY_S) * MICROSECONDS
        self._checker = Helper(_CHECKER)
        self._checking = ThreadPoolExecutor(1, "data-check")
        self._moving = ThreadPoolExecutor(_NUM_MOVED_AT_ONCE, "data-move")
        self._transfers: Counter[str] = Counter()
        self._examining: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        with file_errors("The folder for files of data cannot be made"):
            clear_folder(scratch)

    async def aclose(self) -> None:
        self._checker.close()
        await asyncio.to_thread(self._checking.shutdown)
        self._checker.end()
        await asyncio.to_thread(self._moving.shutdown)

    async def add(
        self, tenant: str, body: AsyncIterator[bytes], content_type: str, content_length: int | None
    ) -> DataFile:
        """Take an upload. Raises InvalidRequest naming the faulty rows, TooLarge, QuotaExceeded, StorageFull, …."""
        with self._transfer(tenant):
            room = await self._database.run(partial(self._room, tenant))
            is_short = room.free < self._max_bytes
            limit, refusal = (room.free, room.refusal) if is_short else (self._max_bytes, self._too_large)
            if limit <= 0:
                raise refusal()
            async with self._folder() as folder:
                form = _DataForm(folder)
                await read_form(
                    body, content_type, form, max_bytes=int(limit), content_length=content_length, too_large=refusal
                )
                expires_us = form.checked_expiry()
                path = form.path
                if path.stat().st_size > limit:
                    raise refusal()
                row = FileRow(
                    id=new_file_id(), tenant=tenant, filename=form.filename, purpose=FINE_TUNE,
                    size_bytes=path.stat().st_size, facts=await self._facts(tenant, path, form.filename),
                    sha256=await asyncio.to_thread(_sha256, path), is_whole=False,
                )  # fmt: skip
                await self._database.run(partial(self._begin, row, expires_us))
                await self._moved(partial(self._store.keep_file, f"files/{row.id}", path))
                return await self._database.run(partial(self._make_whole, row.id))

    async def add_result(self, tenant: str, filename: str, path: Path) -> str:
        """The id of a file whose bytes are stored and which nobody sees before `make_whole`."""
        row = FileRow(
            id=new_file_id(), tenant=tenant, filename=filename, purpose=RESULTS,
            sha256=await asyncio.to_thread(_sha256, path), size_bytes=path.stat().st_size, facts={}, is_whole=False,
        )  # fmt: skip
        await self._database.run(partial(self._begin, row, None))
        await self._moved(partial(self._store.keep_file, f"files/{row.id}", path))
        return row.id

    async def _facts(self, tenant: str, path: Path, name: str) -> dict[str, Any]:
        async with self._examining.setdefault(tenant, asyncio.Lock()):
            return await asyncio.get_running_loop().run_in_executor(self._checking, self._examined, path, name)

    def _examined(self, path: Path, name: str) -> dict[str, Any]:
        found = self._checker.ask({"path": str(path), "name": quoted(name)})
        if "facts" in found:
            facts: dict[str, Any] = found["facts"]
            return facts
        ended = found.get("ended")
        raise InvalidRequest(
            str(found["fault"]) if ended is None else f"Reading the file takes too much {ended}. Send a smaller one.",
            param=_PART,
        )

    def _begin(self, row: FileRow, expires_us: int | None) -> None:
        with self._database.write(None) as session:
            session.execute(select(TenantRow.name).where(TenantRow.name == row.tenant).with_for_update())
            if row.purpose == FINE_TUNE:
                room = _room_in(session, row.tenant)
                if row.size_bytes > room.free:
                    raise room.refusal()
            row.created = now_in(session)
            row.expires = row.created + (self._kept_us if expires_us is None else expires_us)
            session.add(row)

    def _room(self, tenant: str) -> "_Room":
        with self._database.read() as session:
            return _room_in(session, tenant)

    def _too_large(self) -> TooLarge:
        return TooLarge(
            f"The file is larger than the limit of {self._max_bytes} bytes (the setting max_file_size).", param=_PART
        )

    def _make_whole(self, file_id: str) -> DataFile:
        with self._database.write(None) as session:
            return data_file(make_whole(session, file_id))

    async def get(self, tenant: str, file_id: str) -> DataFile:
        """The tenant's file. Raises NotFound."""

        def found() -> DataFile:
            with self._database.read() as session:
                return data_file(find_file(session, tenant, file_id))

        return await self._database.run(found)

    async def needed(self, tenant: str, file_id: str) -> DataFile:
        """The tenant's file for a job that has not ended, be its time over or not. Raises NotFound."""

        def found() -> DataFile:
            with self._database.read() as session:
                return data_file(find_needed_file(session, tenant, file_id))

        return await self._database.run(found)

    async def page(
        self, tenant: str, *, purpose: str | None, limit: int, after: str | None, is_ascending: bool
    ) -> tuple[Sequence[DataFile], bool]:
        """The tenant's files by time, behind `after`, and whether there are more. Raises InvalidRequest.

        Of the facts, those that have a size of their own are left out: a page may be long.
        """

        def found() -> tuple[Sequence[DataFile], bool]:
            with self._database.read() as session:
                query = _page(session, tenant, after, is_ascending=is_ascending)
                query = query if purpose is None else query.where(FileRow.purpose == purpose)
                rows = session.execute(query.limit(limit + 1)).all()
                return [_listed(*row) for row in rows[:limit]], len(rows) > limit

        return await self._database.run(found)

    @asynccontextmanager
    async def content(self, tenant: str, file_id: str) -> AsyncIterator[tuple[DataFile, BufferedReader]]:
        """The file and its bytes, open until the block ends. Raises NotFound, RateLimited or StoreUnavailable."""
        found = await self.get(tenant, file_id)
        with self._transfer(tenant), await self._moved(partial(self._open, found)) as content:
            yield found, content

    def _open(self, file: DataFile) -> BufferedReader:
        content = self._store.open_file(file.place, self._scratch / secrets.token_hex(8))
        if content is None:
            raise _damaged(file)
        with ExitStack() as stack, file_errors("The store cannot be read"):
            stack.enter_context(content)
            if hashlib.file_digest(content, "sha256").hexdigest() != file.sha256:
                raise _damaged(file)
            content.seek(0)
            stack.pop_all()
        return content

    async def fetch(self, file: DataFile, target: Path) -> None:
        """Write the bytes to `target`. Raises StoreUnavailable where they are not those that were kept."""
        await self._moved(partial(fetch_file, self._store, file, target))

    async def _moved(self, move: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._moving, move)

    @contextmanager
    def _transfer(self, tenant: str) -> Iterator[None]:
        """Raises RateLimited beyond those that a tenant may have at a time."""
        if self._transfers[tenant] >= MAX_TRANSFERS:
            raise RateLimited(f"{MAX_TRANSFERS} files of this tenant are being sent or fetched. Wait for one of them.")
        self._transfers[tenant] += 1
        try:
            yield
        finally:
            self._transfers[tenant] -= 1
            if not self._transfers[tenant]:
                del self._transfers[tenant]

    async def delete(self, tenant: str, file_id: str) -> None:
        """Raises NotFound, or Conflict while a job that has not ended needs it."""

        def remove() -> None:
            with self._database.write(None) as session:
                row = find_file(session, tenant, file_id)
                if session.execute(_jobs_with(file_id).limit(1)).first() is not None:
                    raise Conflict(
                        f"The file '{file_id}' is needed by a job that has not ended. Cancel that job, or wait for it."
                    )
                row.is_whole, row.created = False, 0

        await self._database.run(remove)
        await self._moved(partial(self._remove, [file_id]))

    def sweep(self) -> None:
        """Remove what has expired and what a crash left, some at a time. Blocks."""
        with self._database.write(None) as session:
            now = now_in(session)
            due = or_(FileRow.expires <= now, ~FileRow.is_whole & (FileRow.created < now - _ABANDONED_US))
            is_free = ~_jobs_with(FileRow.id).exists()
            query = select(FileRow).where(due, is_free).order_by(FileRow.id).limit(_SWEPT_AT_ONCE)
            rows = session.execute(query).scalars().all()
            for row in rows:
                row.is_whole, row.created = False, 0
        self._remove([row.id for row in rows])

    def _remove(self, ids: Sequence[str]) -> None:
        for file_id in ids:
            self._store.erase(f"files/{file_id}")
            with self._database.write(None) as session:
                session.execute(delete(FileRow).where(FileRow.id == file_id))  # perhaps another has removed it, too

    @asynccontextmanager
    async def _folder(self) -> AsyncIterator[Path]:
        with file_errors("The file cannot be taken"):
            folder = self._scratch / secrets.token_hex(8)
            try:
                folder.mkdir()
                yield folder
            finally:
                await asyncio.to_thread(remove_tree, folder)


class _DataForm(Form):
    """`file`, `purpose` and `expires_after`, as OpenAI's clients send them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(_FIELDS)
        self.filename = ""
        self._folder = folder

    @property
    def path(self) -> Path:
        return self._folder / f"data{Path(self.filename).suffix.lower()}"

    def open_part(self, name: str, filename: str) -> None:
        if name != _PART:
            super().open_part(name, filename)
        elif self.filename:
            self.refuse(InvalidRequest("'file' is sent twice.", param=_PART))
        elif not 0 < len(filename) <= MAX_FILENAME or not filename.isprintable():
            self.refuse(InvalidRequest(f"'file' needs a name of 1 to {MAX_FILENAME} characters.", param=_PART))
        elif Path(filename).suffix.lower() not in _SUFFIXES:
            message = f"'file' needs a name that ends in {', '.join(_SUFFIXES)}, not '{quoted(filename)}'."
            self.refuse(InvalidRequest(message, param=_PART))
        else:
            self.filename = filename
            self.write_to(self.path)

    def checked_expiry(self) -> int | None:
        """Microseconds from now to its end, None where nothing is said. Raises InvalidRequest for what is missing."""
        purpose = self.fields.get("purpose")
        if purpose is None:
            raise InvalidRequest("The field 'purpose' is required.", param="purpose")
        if purpose != FINE_TUNE:
            said = f"'purpose' must be '{FINE_TUNE}', not '{quoted(purpose)}': files are kept for nothing else here."
            raise UnsupportedField(said, param="purpose")
        if not self.filename:
            raise InvalidRequest("The field 'file' is required.", param=_PART)
        anchor, seconds = (self.fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
        if anchor is None and seconds is None:
            return None
        if anchor != "created_at":
            raise InvalidRequest("'expires_after[anchor]' must be 'created_at'.", param="expires_after[anchor]")
        is_number = seconds is not None and seconds.isascii() and seconds.isdigit() and len(seconds) < 9
        if not is_number or not MIN_EXPIRY_S <= int(seconds or 0) <= MAX_EXPIRY_S:
            raise InvalidRequest(
                f"'expires_after[seconds]' must be a whole number from {MIN_EXPIRY_S} to {MAX_EXPIRY_S}.",
                param="expires_after[seconds]",
            )
        return int(seconds or 0) * MICROSECONDS


def find_file(session: Session, tenant: str, file_id: str) -> FileRow:
    """The tenant's file, while its time lasts. Raises NotFound: for another tenant's, too."""
    row = find_needed_file(session, tenant, file_id)
    if _is_over(row, now_in(session)):
        raise _no_file(file_id)
    return row


def find_needed_file(session: Session, tenant: str, file_id: str) -> FileRow:
    """The tenant's file for a job that has not ended, which keeps it beyond its time. Raises NotFound."""
    row = session.get(FileRow, file_id)
    if row is None or row.tenant != tenant or not row.is_whole:
        raise _no_file(file_id)
    return row


def _no_file(file_id: str) -> NotFound:
    return NotFound(f"There is no file '{quoted(file_id)}'. GET /v1/files lists yours.")


def make_whole(session: Session, file_id: str) -> FileRow:
    """Let the file be seen, whose bytes are in the store."""
    row = session.get_one(FileRow, file_id)
    row.is_whole = True
    return row


@dataclass(frozen=True, slots=True)
class _Room:
    """The bytes that a tenant's files take together, and may."""

    tenant: str
    kept: int
    most: int | None

    @property
    def free(self) -> float:
        """How many bytes more there may be."""
        return math.inf if self.most is None else self.most - self.kept

    def refusal(self) -> QuotaExceeded:
        return QuotaExceeded(
            f"The tenant '{self.tenant}' has used up its quota of files' bytes ({self.kept} of {self.most}), or this "
            "file has more than it leaves. Delete some.",
            retry_after_s=_QUOTA_RETRY_S,
        )


def _room_in(session: Session, tenant: str) -> _Room:
    """Raises QuotaExceeded for a tenant that has as many files as it may have."""
    own = func.count().filter(FileRow.purpose == FINE_TUNE)
    query = select(own, func.coalesce(func.sum(FileRow.size_bytes), 0)).where(FileRow.tenant == tenant)
    count, kept = session.execute(query).one()
    if count >= MAX_FILES:
        message = f"The tenant '{tenant}' has {count} files, as many as it may. Delete some."
        raise QuotaExceeded(message, retry_after_s=_QUOTA_RETRY_S)
    return _Room(tenant, int(kept), limits_in(session, tenant).max_file_bytes)


def fetch_file(store: Store, file: DataFile, target: Path) -> None:
    """Write a file's bytes to `target`. Raises StoreUnavailable where they are not those that were kept."""
    if not store.fetch_file(file.place, target) or _sha256(target) != file.sha256:
        raise _damaged(file)


def _damaged(file: DataFile) -> StoreUnavailable:
    return StoreUnavailable(f"The bytes of the file '{file.id}' are missing or damaged in the store.")


def _is_over(row: FileRow, now: int) -> bool:
    return row.expires is not None and row.expires <= now


def _listed(row: FileRow, num_rows: int | None, shape: str | None) -> DataFile:
    values = {name: getattr(row, name) for name in DataFile.__slots__ if name != "facts"}
    return DataFile(**values, facts={"num_rows": num_rows, "shape": shape})


def _page(
    session: Session, tenant: str, after: str | None, *, is_ascending: bool
) -> Select[FileRow, int | None, str | None]:
    """A query for rows without their facts, and the two of these that are always small."""
    now = now_in(session)
    is_there = FileRow.is_whole & or_(FileRow.expires.is_(None), FileRow.expires > now)
    small = FileRow.facts["num_rows"].as_integer(), FileRow.facts["shape"].as_string()
    query = select(FileRow, *small).options(defer(FileRow.facts, raiseload=True))
    query = query.where(FileRow.tenant == tenant, is_there)
    place = tuple_(FileRow.created, FileRow.id)
    if after is not None:
        start = session.get(FileRow, after)
        if start is None or start.tenant != tenant:
            raise InvalidRequest(f"'after' is no file of yours: '{quoted(after)}'.", param="after")
        begin = tuple_(start.created, start.id)
        query = query.where(place > begin if is_ascending else place < begin)
    if is_ascending:
        return query.order_by(FileRow.created, FileRow.id)
    return query.order_by(FileRow.created.desc(), FileRow.id.desc())


def _jobs_with(file_id: Any) -> "Select[str]":
    """Jobs that have not ended and need the file."""
    needs = or_(JobRow.training_file == file_id, JobRow.validation_file == file_id)
    return select(JobRow.id).where(JobRow.status.in_(LIVE), needs)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
