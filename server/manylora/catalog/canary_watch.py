"""Canaries as the rest of the program uses them: begun, looked at, stopped, and ended by themselves."""

import asyncio
import logging
from dataclasses import replace
from functools import partial
from typing import Final

from sqlalchemy import select

from manylora.catalog import canaries, queries
from manylora.catalog.base_signature import BaseSignature
from manylora.catalog.canaries import CanaryRecord
from manylora.catalog.registry import Registry
from manylora.catalog.upload import check_note
from manylora.database.database import Database
from manylora.database.tables import AdapterRow, CanaryRow
from manylora.errors import AdapterNotFound, Unavailable
from manylora.identity import SERVER, Author

__all__ = ["Canaries"]

_LOOK_EVERY_S: Final = 2.0
_log = logging.getLogger(__name__)


class Canaries:
    """Used on the event loop. From `start` to `aclose` those that are worse, or over, are ended.

    Every server of a database looks; what is ended is ended once, whoever is first.
    """

    def __init__(self, database: Database, registry: Registry, base: BaseSignature) -> None:
        self._database = database
        self._registry = registry
        self._base = base
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch(), name="canaries")

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def begin(
        self, tenant: str, name: str, version: int, *, share: float, until: int | None, author: Author = SERVER
    ) -> CanaryRecord:
        """See `canaries.begin`; `until` is in Unix microseconds."""
        check_note(author.note)

        def change() -> CanaryRecord:
            with self._registry.changing(tenant, name) as (session, row):
                canaries.begin(session, row, version, self._base, share=share, until=until, author=author)
                session.flush()
                return canaries.last(session, row)

        return await self._database.run(change)

    async def stop(self, tenant: str, name: str, *, author: Author = SERVER) -> CanaryRecord:
        """End the one that runs. Raises AdapterNotFound, or NotFound where none runs."""
        check_note(author.note)

        def change() -> CanaryRecord:
            with self._registry.changing(tenant, name) as (session, row):
                canaries.end(session, row, "stopped", author)
                session.flush()
                return canaries.last(session, row)

        return await self._database.run(change)

    async def last(self, tenant: str, name: str) -> CanaryRecord:
        """The one that runs, or the one before. Raises AdapterNotFound, or NotFound where there was none."""

        def look() -> CanaryRecord:
            with self._database.read() as session:
                return canaries.last(session, queries.get_adapter(session, tenant, name))

        return await self._database.run(look)

    async def look(self) -> None:
        """End those that are worse than what runs beside them, and those whose time is over."""
        for tenant, name, seen in await self._database.run(self._open):
            try:
                record = await self._database.run(partial(self._end_if_over, tenant, name, seen))
            except AdapterNotFound:
                continue
            if record is not None:
                _log.warning("The canary %s/%s@%d has ended: %s", tenant, name, record.tried.version, record.said)

    def _open(self) -> list[tuple[str, str, str]]:
        a, c = AdapterRow, CanaryRow
        query = select(a.tenant, a.name, c.id).join(c, c.id == a.canary).where(c.ended.is_(None)).order_by(c.created)
        with self._database.read() as session:
            return [(tenant, name, seen) for tenant, name, seen in session.execute(query)]

    def _end_if_over(self, tenant: str, name: str, seen: str) -> CanaryRecord | None:
        with self._database.read() as session:  # most often it goes on, and nothing is to be written
            row = queries.get_adapter(session, tenant, name)
            if canaries.verdict(session, row, seen) is None:
                return None
        with self._registry.changing(tenant, name) as (session, row):
            found = canaries.verdict(session, row, seen)
            if found is None:
                return None
            record, reason = found
            note = record.said if reason == "worse" else "Its time is over."
            canaries.end(session, row, reason, replace(SERVER, note=note))
            return record

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            try:
                await self.look()
            except Unavailable:
                continue  # which the database has said
            except Exception:  # noqa: BLE001 - whatever it is, this goes on looking
                _log.exception("Canaries cannot be looked at now.")
