"""What other servers change, heard of at once: PostgreSQL's LISTEN, on one connection beside those of the pools.

Nobody depends on it: who waits for a topic is woken by a notice, and without one looks again after a while.
"""

import asyncio
import logging
from contextlib import suppress
from typing import Final, get_args

from manylora.database.database import Database, Topic, channel_of

__all__ = ["Notices"]

_POLL_S: Final = 1.0
_SAFETY_S: Final = 5.0  # between looks while notices come
_RETRY_S: Final = 1.0
_log = logging.getLogger(__name__)


class Notices:
    """Used on the event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._news = {topic: asyncio.Event() for topic in get_args(Topic)}
        self._is_hearing = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Listen until `aclose`. There is nobody to listen to on a SQLite database, which one server has for itself."""
        if not self._database.is_sqlite:
            self._task = asyncio.create_task(self._listen(), name="database-notices")

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def wait(self, topic: Topic) -> None:
        """Return when somebody has changed the topic, or when it is time to look whether somebody has."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news[topic].wait(), _SAFETY_S if self._is_hearing else _POLL_S)
        self._news[topic].clear()

    async def _listen(self) -> None:
        topics = {channel_of(topic): topic for topic in self._news}
        while True:
            try:
                async with self._database.listening(list(topics)) as channels:
                    self._is_hearing = True
                    for news in self._news.values():  # what was said before
                        news.set()
                    async for channel in channels:
                        self._news[topics[channel]].set()
            except OSError:
                pass  # the pools' connections say that the database is away
            except Exception:  # noqa: BLE001 - whatever it is, notices are asked for again
                _log.exception("What other servers change is looked for, as they are not heard")
            self._is_hearing = False
            await asyncio.sleep(_RETRY_S)
