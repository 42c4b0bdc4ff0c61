"""Files of deleted versions go once no server needs them, whichever server finds that out."""

import asyncio
import logging
import time
from collections.abc import Callable

from manylora.catalog.blobs import LONGEST_HELD_S, Blobs
from manylora.catalog.registry import Registry
from manylora.database.database import Database
from manylora.database.replicas import BEAT_S, Replicas
from manylora.errors import DatabaseUnavailable, ManyloraError, Unavailable

__all__ = ["Freeing"]

_log = logging.getLogger(__name__)


class Freeing:
    """Used on the event loop."""

    def __init__(self, database: Database, registry: Registry, blobs: Blobs, replicas: Replicas) -> None:
        self._database = database
        self._registry = registry
        self._blobs = blobs
        self._replicas = replicas
        self._on_servers: Callable[[], None] = lambda: None
        self._freeing = asyncio.Lock()
        self._beating: asyncio.Task[None] | None = None

    async def start(self, on_servers: Callable[[], None]) -> None:
        """Be known to the other servers until `aclose`; `on_servers` is called once one is there or gone.

        Raises DatabaseUnavailable.
        """
        self._on_servers = on_servers
        await self._database.run(lambda: self._replicas.join(self._registry.let_go))
        if not self._database.is_sqlite:
            self._beating = asyncio.create_task(self._beat(), name="catalog-beat")

    async def aclose(self) -> None:
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.gather(self._beating, return_exceptions=True)
        try:
            await self._database.run(self._replicas.leave)
        except ManyloraError as error:
            _log.warning("That this server has left is not known to others for a while: %s", error.message)

    async def free(self) -> None:
        """Say what this server has let go of, and remove the files that no server needs. Raises DatabaseUnavailable."""
        async with self._freeing:
            before = self._replicas.live
            found = await self._database.run(self._find)
            if self._replicas.live != before:
                self._on_servers()
            for blob, version_id in found:
                try:
                    await asyncio.to_thread(self._blobs.free, blob, version_id)
                except DatabaseUnavailable:
                    raise
                except ManyloraError as error:
                    _log.warning("The files of a deleted version, blob %s, stay for now: %s", blob, error.message)
                except Exception:  # noqa: BLE001 - whatever is the matter with one's files, others' go
                    _log.exception("The files of a deleted version, blob %s, stay for now", blob)

    def _find(self) -> list[tuple[str, str]]:
        everywhere = self._replicas.beat(self._registry.let_go)
        return self._blobs.retired.let_go(everywhere, before=time.time() - LONGEST_HELD_S)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            try:
                await self.free()
            except Unavailable:
                continue  # which the database has said
            except Exception:  # noqa: BLE001 - whatever it is, this server has to be known to the others
                _log.exception("Files of deleted adapters stay, and are looked at again")
