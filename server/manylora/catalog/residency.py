"""What the engine holds for the catalog: pinned versions stay, deleted ones go once their users have finished."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection

from manylora.catalog.directory import Directory, Entry
from manylora.database.replicas import Replicas
from manylora.engine.interface import AdapterRef, EngineClient
from manylora.errors import ManyloraError
from manylora.threads import on_event_loop

_log = logging.getLogger(__name__)


class Pins:
    """Keeps the engine's pins equal to the directory's: the active version of every pinned adapter.

    With `num_servers`, so many of the servers on one database pin each of them, and the others do not.
    """

    def __init__(self, engine: EngineClient, directory: Directory, replicas: Replicas, num_servers: int | None) -> None:
        self._engine = engine
        self._directory = directory
        self._replicas = replicas
        self._num_servers = num_servers
        self._held: dict[tuple[str, str], AdapterRef] = {}

    def sync(self, tenant: str, name: str) -> None:
        """Pin what this adapter's entry asks for now, then let go of what was pinned before.

        Raises what `EngineClient.pin` raises, after the old pin was given up.
        """
        assert on_event_loop()
        wanted = self._wanted(self._directory.own(tenant, name))
        held = self._held.pop((tenant, name), None)
        try:
            if wanted is not None:
                if wanted != held:
                    self._engine.pin(wanted)
                self._held[tenant, name] = wanted
        finally:
            if held is not None and held != wanted:
                self._engine.unpin(held)

    def sync_all(self, names: Collection[tuple[str, str]] | None = None) -> None:
        """`sync` for these adapters, or all, after the directory has changed. What cannot be pinned is logged."""
        if names is None:
            wanted = {(e.tenant, e.name) for e in self._directory.entries() if self._wanted(e) is not None}
            names = wanted | set(self._held)
        for tenant, name in names:
            try:
                self.sync(tenant, name)
            except ManyloraError as error:
                _log.warning("%s/%s cannot be pinned: %s", tenant, name, error.message)

    def _wanted(self, entry: Entry | None) -> AdapterRef | None:
        active = self._directory.active_of(entry) if entry is not None and entry.pinned else None
        if active is None:
            return None
        ref, num = active.ref, self._num_servers
        return ref if num is None or self._replicas.is_among(num, ref.id) else None

    def share(self) -> None:
        """Servers have come or gone: some pins are others' now, and some of theirs are this one's."""
        if self._num_servers is not None:
            self.sync_all()


class Retirement:
    """What happens to a deleted version: its users finish, the engine forgets it, its files go.

    One background task each. `free` removes the files that no server needs any more.
    """

    def __init__(self, engine: EngineClient, directory: Directory, free: Callable[[], Awaitable[None]]) -> None:
        self._engine = engine
        self._directory = directory
        self._free = free
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, ref: AdapterRef) -> None:
        """`ref` is gone from the database. Its files go only where somebody said so, here or on another server.

        A database that was restored from a backup may just not know the version.
        """
        task = asyncio.create_task(self._retire(ref), name=f"retire {ref.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _retire(self, ref: AdapterRef) -> None:
        try:
            await self._engine.forget(ref)
            self._directory.release(ref.id)
            await self._free()
        except ManyloraError as error:
            _log.warning("The files of %s/%s stay for now: %s", ref.tenant, ref.label, error)

    async def settled(self) -> None:
        """Wait until every version deleted so far is gone."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def aclose(self) -> None:
        """Leave what is not done to the next start's sweep."""
        for task in self._tasks:
            task.cancel()
        await self.settled()
