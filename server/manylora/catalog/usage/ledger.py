"""Usage as it happens: counted when a request ends, and in the database before the last bytes of its answer leave.

Requests that end while a transaction runs share the next one, so a busy server pays for few, and the engine for none:
it does not wait, only the end of the answer does. Should the database not answer, nobody is held up for longer than
`_PATIENCE_S`; what could not be written stays in memory, is written once it can be, and is lost only if the process
is killed before that.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Final

from manylora.catalog.database import Database
from manylora.catalog.interface import Use
from manylora.catalog.usage.period import QUARTER_S, quarter_of
from manylora.catalog.usage.store import Batch, UsageStore
from manylora.errors import ManyloraError
from manylora.lora.occupancy import Occupancy, Stay

__all__ = ["UsageLedger", "add_stays"]

# An answer waits no longer than this for its usage to be written.
_PATIENCE_S: Final = 5.0
_RETRY_S: Final = 1.0
# Attempts at the end of the process, after which what is left is logged as lost.
_LAST_ATTEMPTS: Final = 5
# Time in slots runs on without requests; this much of it is lost at most when the process is killed.
_SLOT_TIME_EVERY_S: Final = 60.0
# However often somebody looks, the time in slots is written once a second: a row for each adapter that sits in one.
_SLOT_TIME_AGE_S: Final = 1.0
_log = logging.getLogger(__name__)


class _Sending:
    """A batch and those who wait for it."""

    def __init__(self, batch: Batch | None = None) -> None:
        self.batch = batch or Batch()
        self.tried = asyncio.Event()


class UsageLedger:
    """Implements `catalog.interface.UsageSink`. Used on the event loop's thread; one thread of its own writes."""

    def __init__(
        self,
        database: Database,
        occupancy: Occupancy,
        *,
        clock: Callable[[], float] = time.time,
        retry_s: float = _RETRY_S,
    ) -> None:
        self.database = database
        self._occupancy = occupancy
        self._clock = clock
        self._retry_s = retry_s
        self._store = UsageStore(database, uuid.uuid4().hex)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="usage")
        self._number = 0
        self._next = _Sending()
        self._current: _Sending | None = None
        self._wake = asyncio.Event()
        self._is_failing = False
        self._is_closing = False
        self._slots_due = time.monotonic() + _SLOT_TIME_EVERY_S
        self._slots_taken: float | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Write until `aclose`."""
        self._task = asyncio.create_task(self._write_all(), name="usage")

    def add(self, use: Use) -> None:
        """Count one request."""
        owner, name = (use.adapter.tenant, use.adapter.name) if use.adapter else ("", "")
        key = (quarter_of(self._clock()), use.tenant, owner, name, use.outcome)
        self._next.batch.add(key, use.prompt_tokens, use.completion_tokens, use.cached_tokens)
        self._wake.set()

    async def stored(self) -> None:
        """Wait until everything counted so far is in the database, or the database has failed to take it."""
        waiting = self._current if self._next.batch.is_empty else self._next
        if waiting is None or self._is_failing:
            return
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await waiting.tried.wait()
        except TimeoutError:
            _log.warning("Storing usage takes longer than %s s: answers go out before it is done", _PATIENCE_S)

    async def flush(self) -> None:
        """Bring the database up to now, the time in slots up to `_SLOT_TIME_AGE_S` ago."""
        if self._slots_taken is None or abs(self._clock() - self._slots_taken) >= _SLOT_TIME_AGE_S:
            self._take_slot_time()
        await self.stored()

    async def aclose(self) -> None:
        """Write what is left. Call it when no request runs and the engine has ended."""
        self._take_slot_time()
        self._is_closing = True
        self._wake.set()
        if self._task is not None:
            await self._task
        with suppress(ManyloraError):
            await self._on_thread(partial(self._store.forget_writer, self._now_us()))
        self._thread.shutdown()

    def _take_slot_time(self) -> None:
        offset_us = self._now_us() - self._occupancy.clock_us()
        self._slots_taken = self._clock()
        add_stays(self._next.batch, self._occupancy.take(), offset_us)
        self._slots_due = time.monotonic() + _SLOT_TIME_EVERY_S
        if not self._next.batch.is_empty:
            self._wake.set()

    async def _write_all(self) -> None:
        with suppress(ManyloraError):  # which the first write will say
            await self._on_thread(self._store.prepare)
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, self._slots_due - time.monotonic())):
                    await self._wake.wait()
            self._wake.clear()
            if time.monotonic() >= self._slots_due:
                self._take_slot_time()
            if not self._next.batch.is_empty:
                self._current, self._next = self._next, _Sending()
                await self._write(self._current)
                self._current = None
            if self._is_closing and self._next.batch.is_empty:
                return

    async def _write(self, sending: _Sending) -> None:
        """Write one batch, however often it takes. Waiting for it ends with the first attempt."""
        self._number += 1
        num_last = 0
        while True:
            try:
                await self._on_thread(partial(self._store.write, self._number, sending.batch, self._now_us()))
            except ManyloraError as error:
                num_last += self._is_closing
                if num_last >= _LAST_ATTEMPTS:
                    lost = sum(counts[0] for counts in sending.batch.usage.values())
                    _log.exception("The usage of %d requests is lost: the database did not take it", lost)
                    return
                if not self._is_failing:
                    _log.error("The database does not take usage, which is kept and tried again: %s", error)
                self._is_failing = True
                sending.tried.set()
                self._release_next()
                await asyncio.sleep(self._retry_s)
            else:
                self._is_failing = False
                sending.tried.set()
                return

    def _release_next(self) -> None:
        """The next batch has to wait, and those who wait for it shall not."""
        released, self._next = self._next, _Sending(self._next.batch)
        released.tried.set()

    async def _on_thread(self, work: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _now_us(self) -> int:
        return int(self._clock() * 1_000_000)


def add_stays(batch: Batch, stays: list[Stay], offset_us: int) -> None:
    """Stays into a batch, cut where quarters of an hour begin. `offset_us` turns their clock into Unix time."""
    for stay in stays:
        start, end = stay.start_us + offset_us, stay.end_us + offset_us
        while start < end:
            quarter = quarter_of(start // 1_000_000)
            cut = min(end, (quarter + QUARTER_S) * 1_000_000)
            batch.add_slot_time((quarter, stay.tenant, stay.adapter), cut - start)
            start = cut
