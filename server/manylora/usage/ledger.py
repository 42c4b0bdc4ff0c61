"""Usage as it happens: counted when a request ends, and kept for good before the last bytes of its answer leave.

Requests that end while a transaction runs share the next one, so a busy server pays for few, and the engine for none:
it does not wait, only the end of the answer does. A database that does not take a batch in `wait_s` holds up nobody
again: until it has, usage is kept in a journal on this machine's disk (`journal`), which takes milliseconds, and is
written to the database once that answers, by this process or by the next one.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from manylora.database.database import Database
from manylora.database.tables import MICROSECONDS
from manylora.errors import ManyloraError
from manylora.identity import AdapterRef
from manylora.lora.memory.occupancy import Occupancy, Stay
from manylora.threads import on_event_loop
from manylora.usage.interface import Use
from manylora.usage.journal import journal_of, journals_of_others, read_journal
from manylora.usage.period import QUARTER_S, quarter_of
from manylora.usage.store import Batch, Counts, UsageStore

__all__ = ["UsageLedger", "add_stays"]

R = TypeVar("R")
_WAIT_S: Final = 1.0
_RETRY_S: Final = 1.0
# Attempts at the end of the process where the journal fails too, after which what is left is logged as lost.
_LAST_ATTEMPTS: Final = 5
# A journal that has grown so much, and to twice its size, is written anew: equal keys are one line then.
_COMPACT_BYTES: Final = 2**24
# Time in slots runs on without requests; this much of it is lost at most when the process is killed.
_SLOT_TIME_EVERY_S: Final = 60.0
# However often somebody looks, the time in slots is written once a second: a row for each adapter that sits in one.
_SLOT_TIME_AGE_S: Final = 1.0
_log = logging.getLogger(__name__)


class _Sending:
    """A batch, its number once it has one, and those who wait until it is kept for good."""

    def __init__(self) -> None:
        self.batch = Batch()
        self.number = 0
        self.kept = asyncio.Event()


class UsageLedger:
    """Implements `usage.interface.UsageSink`. Used on the event loop's thread; threads of its own write.

    `folder` is where journals are. A batch is `_next` while it grows, then `_current` while the database is to take it;
    where that fails, what ends meanwhile is added to `_later`, under the number of the last batch in it.
    """

    def __init__(
        self,
        database: Database,
        occupancy: Occupancy,
        folder: Path,
        *,
        wait_s: float = _WAIT_S,
        clock: Callable[[], float] = time.time,
        retry_s: float = _RETRY_S,
    ) -> None:
        self.database = database
        self._occupancy = occupancy
        self._folder = folder
        self._wait_s = wait_s
        self._clock = clock
        self._retry_s = retry_s
        self._writer = uuid.uuid4().hex
        self._store = UsageStore(database, self._writer)
        self._journal = journal_of(folder, self._writer)
        self._compact_at = _COMPACT_BYTES
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="usage")
        self._journal_thread = ThreadPoolExecutor(1, thread_name_prefix="usage-journal")
        self._number = 0
        self._written = 0
        self._next = _Sending()
        self._current: _Sending | None = None
        self._later: _Sending | None = None
        self._journaling = asyncio.Lock()
        self._wake = asyncio.Event()
        self._is_failing = False
        self._has_gaps = False  # the journal could not take something that the database has not either
        self._is_closing = False
        self._slots_due = time.monotonic() + _SLOT_TIME_EVERY_S
        self._slots_taken: float | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Write until `aclose`."""
        self._tasks = [
            asyncio.create_task(self._write_all(), name="usage"),
            asyncio.create_task(self._take_over(), name="usage-journals"),
        ]

    def add(self, use: Use) -> None:
        """Count one request."""
        counts = (1, use.prompt_tokens, use.completion_tokens, use.cached_tokens)
        self._add(use.tenant, use.adapter, use.outcome, counts)
        if use.canary and use.adapter is not None:
            waited = (0, 0) if use.ttft_s is None else (1, round(use.ttft_s * MICROSECONDS))
            self._next.batch.add_canary((use.canary, use.adapter.version, use.outcome), (*counts, *waited))

    def add_probe(self, tenant: str, adapter: AdapterRef, prompt_tokens: int) -> None:
        """Count what an upload has run, which is no request; see `interface.UsageSink`."""
        self._add(tenant, adapter, "ok", (0, prompt_tokens, 0, 0))

    def _add(self, tenant: str, adapter: AdapterRef | None, outcome: str, counts: Counts) -> None:
        assert on_event_loop()
        owner, name = (adapter.tenant, adapter.name) if adapter else ("", "")
        self._next.batch.add((quarter_of(self._clock()), tenant, owner, name, outcome), counts)
        self._wake.set()

    async def stored(self) -> None:
        """Wait until everything counted so far is in the database, or in the journal."""
        waiting = self._current if self._next.batch.is_empty else self._next
        if waiting is None or waiting.kept.is_set():
            async with self._journaling:  # somebody may be writing down what was counted here
                return
        if not self._is_failing:
            try:
                async with asyncio.timeout(self._wait_s):
                    await waiting.kept.wait()
            except TimeoutError:
                self._note_failing(f"it has taken more than {self._wait_s:g} s")
        if not waiting.kept.is_set():
            await self._keep_in_journal()

    async def flush(self) -> None:
        """Bring the database up to now, the time in slots up to `_SLOT_TIME_AGE_S` ago."""
        if self._slots_taken is None or abs(self._clock() - self._slots_taken) >= _SLOT_TIME_AGE_S:
            self._take_slot_time()
        await self.stored()

    async def aclose(self) -> None:
        """Write what is left, to the journal where the database does not take it.

        Call it when no request runs and the engine has ended.
        """
        self._take_slot_time()
        self._is_closing = True
        self._wake.set()
        if self._tasks:
            writing, taking_over = self._tasks
            taking_over.cancel()
            await asyncio.gather(taking_over, return_exceptions=True)
            await writing
        if not self._journal.last:  # else the next start needs to know what of it was written
            with suppress(ManyloraError):
                await self._on_thread(partial(self._store.forget_writer, self._now_us()))
        self._thread.shutdown()
        self._journal_thread.shutdown()

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
            while (sending := self._later or self._cut()) is not None:
                self._current, self._later = sending, None
                if not await self._write(sending):
                    return
                self._current = None
            if self._is_closing:
                return

    def _cut(self) -> _Sending | None:
        """What was counted since the last time, under a number."""
        if self._next.batch.is_empty:
            return None
        sending, self._next = self._next, _Sending()
        self._number += 1
        sending.number = self._number
        return sending

    async def _write(self, sending: _Sending) -> bool:
        """Write one batch, however often it takes. False where the process ends before."""
        num_last = 0
        while True:
            try:
                await self._on_thread(partial(self._store.write, sending.number, sending.batch, self._now_us()))
            except Exception as error:  # noqa: BLE001 - whatever it is, what was counted is kept and tried again
                self._note_failing(str(error))
                is_kept = await self._keep_in_journal()
                num_last += self._is_closing
                if self._is_closing and is_kept:
                    _log.warning("Usage stays in %s, and is written at the next start", self._journal.path)
                    return False
                if num_last >= _LAST_ATTEMPTS:
                    lost = sending.batch.num_requests + (self._later.batch.num_requests if self._later else 0)
                    _log.exception("The usage of %d requests is lost: neither database nor journal took it", lost)
                    return False
                await asyncio.sleep(self._retry_s)
            else:
                self._written = sending.number
                sending.kept.set()
                if self._is_failing:
                    self._is_failing = False
                    _log.warning("The database takes usage again")
                if self._later is None:
                    self._has_gaps = False
                await self._clear_journal()
                return True

    def _note_failing(self, why: str) -> None:
        if not self._is_failing:
            _log.error("The database does not take usage, which is kept in %s meanwhile: %s", self._journal.path, why)
        self._is_failing = True

    async def _keep_in_journal(self) -> bool:
        """Write what the database has not confirmed to the journal. Requests that come together share a write."""
        async with self._journaling:
            fresh = self._cut()
            if fresh is not None:
                if self._later is None:
                    self._later = _Sending()
                    self._later.kept.set()  # who waits for its parts holds these
                self._later.batch.merge(fresh.batch)
                self._later.number = fresh.number
            waiting = [each for each in (self._current, fresh) if each is not None and not each.kept.is_set()]
            try:
                if waiting:
                    await self._in_journal(waiting)
            except OSError as error:
                if not self._has_gaps:
                    _log.error("The usage journal fails too: usage is in memory only, lost in a crash: %s", error)
                self._has_gaps = True
            finally:
                for each in waiting:
                    each.kept.set()
            return not self._has_gaps

    async def _in_journal(self, waiting: list[_Sending]) -> None:
        loop = asyncio.get_running_loop()
        if not self._has_gaps and self._journal.size_bytes < self._compact_at:
            batches = [(each.number, each.batch) for each in waiting]
            await loop.run_in_executor(self._journal_thread, self._journal.append, batches)
            return
        everything = [each for each in (self._current, self._later) if each is not None]
        batches = [(each.number, each.batch.copy()) for each in everything]
        await loop.run_in_executor(self._journal_thread, self._journal.replace, batches)
        self._compact_at = max(_COMPACT_BYTES, 2 * self._journal.size_bytes)
        self._has_gaps = False

    async def _clear_journal(self) -> None:
        """Remove the journal once the database has all of it."""
        if not self._journal.last:
            return
        async with self._journaling:
            if self._journal.last <= self._written:
                with suppress(OSError):  # reading it again would change nothing
                    await asyncio.get_running_loop().run_in_executor(self._journal_thread, self._journal.clear)

    async def _take_over(self) -> None:
        """Write what earlier processes on this data folder had to leave in their journals."""
        for path in await asyncio.to_thread(journals_of_others, self._folder, self._writer):
            while True:
                try:
                    num = await self._on_thread(partial(self._write_again, path))
                    _log.warning("The usage of %d requests that %s held is in the database now", num, path)
                    break
                except ManyloraError:  # the database says so
                    await asyncio.sleep(self._retry_s)
                except OSError as error:
                    _log.error("The usage journal %s cannot be read: %s", path, error)
                    break

    def _write_again(self, path: Path) -> int:
        num_requests = UsageStore(self.database, path.stem).write_again(read_journal(path), self._now_us())
        path.unlink()
        return num_requests

    async def _on_thread(self, work: Callable[[], R]) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _now_us(self) -> int:
        return int(self._clock() * 1_000_000)


def add_stays(batch: Batch, stays: list[Stay], offset_us: int) -> None:
    """Add stays to a batch, cut where quarters of an hour begin. `offset_us` turns the stays' clock into Unix time."""
    for stay in stays:
        start, end = stay.start_us + offset_us, stay.end_us + offset_us
        while start < end:
            quarter = quarter_of(start // 1_000_000)
            cut = min(end, (quarter + QUARTER_S) * 1_000_000)
            batch.add_slot_time((quarter, stay.tenant, stay.adapter), cut - start)
            start = cut
