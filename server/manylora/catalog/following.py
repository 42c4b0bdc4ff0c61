"""How a server follows what others on its database change: when they say so, and when it is asked for what it lacks."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

from manylora.catalog.registry import Registry
from manylora.database.database import Database
from manylora.database.notices import Notices
from manylora.errors import Unavailable

__all__ = ["Follower"]

_LOOK_EVERY_S: Final = 0.1
# Who asks for what is not known waits so long for a look at the database.
_LOOK_WAIT_S: Final = 1.0
_log = logging.getLogger(__name__)


class Follower:
    """Implements `catalog.interface.Following`. `refresh` takes over what changed. Used on the event loop."""

    def __init__(self, database: Database, registry: Registry, refresh: Callable[[], Awaitable[None]]) -> None:
        self._database = database
        self._registry = registry
        self._refresh = refresh
        self._watching: asyncio.Task[None] | None = None
        self._next_look: asyncio.Task[bool] | None = None
        self._looks: set[asyncio.Task[bool]] = set()  # that one and the one that is under way
        self._looking = asyncio.Lock()
        self._looked_at = time.monotonic() - _LOOK_EVERY_S

    def start(self, notices: Notices) -> None:
        self._watching = asyncio.create_task(self._watch(notices), name="catalog-watch")

    async def aclose(self) -> None:
        """Whoever waits for a look is told that there was none."""
        tasks = [*self._looks, *([] if self._watching is None else [self._watching])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def revision(self) -> int:
        """What this server knows of, its own changes among it."""
        return self._registry.revision

    async def look_again(self) -> bool:
        """Take over what was committed anywhere before this call; False where the database did not answer in time.

        One look at a time and ten in a second, however many names are guessed. Nobody else writes to SQLite.
        """
        if self._database.is_sqlite:
            return True
        if self._next_look is None:
            self._next_look = asyncio.create_task(self._look_soon(), name="catalog-look")
            self._looks.add(self._next_look)
            self._next_look.add_done_callback(self._looks.discard)
        look = self._next_look
        await asyncio.wait([look], timeout=_LOOK_WAIT_S)
        return look.done() and not look.cancelled() and look.result()

    async def reach(self, revision: int) -> None:
        """Return once this server knows of the revision. Raises Unavailable where it cannot find out in time.

        One that the database does not know, since it is of another or of a time before a backup, asks for nothing.
        """
        if self._registry.seen < revision and not await self.look_again():
            raise Unavailable(
                "This server does not know yet what you have changed, and its database does not answer. Try again."
            )

    async def _look_soon(self) -> bool:
        async with self._looking:
            await asyncio.sleep(self._looked_at + _LOOK_EVERY_S - time.monotonic())
            self._looked_at = time.monotonic()
            self._next_look = None  # who comes from now on may want what is committed after this look
            try:
                await self._refresh()
            except Unavailable:
                return False
        return True

    async def _watch(self, notices: Notices) -> None:
        while True:
            await notices.wait("catalog")
            try:
                await self._refresh()
            except Unavailable:
                continue  # which the database has said
            except Exception:  # noqa: BLE001 - whatever it is, this goes on looking
                _log.exception("The adapters stay as they were, and are looked at again")
