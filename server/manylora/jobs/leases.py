"""Leases that are renewed beside work that may take longer than they last: files on their way, a publication."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Final

from manylora.database.database import Database
from manylora.errors import Unavailable
from manylora.jobs.queue import LEASE_S, Claim, JobQueue

__all__ = ["HOLD_EVERY_S", "held", "held_by_thread"]

HOLD_EVERY_S: Final = LEASE_S / 6


@contextmanager
def held_by_thread(queue: JobQueue, claim: Claim) -> Iterator[None]:
    """Keep the job through the block, unless it is lost. Blocks."""
    is_over = threading.Event()

    def hold() -> None:
        is_mine = True
        while is_mine and not is_over.wait(HOLD_EVERY_S):
            with suppress(Unavailable):  # the next try may come in time
                is_mine = queue.hold(claim)

    holder = threading.Thread(target=hold, name="lease", daemon=True)
    holder.start()
    try:
        yield
    finally:
        is_over.set()
        holder.join()


@asynccontextmanager
async def held(database: Database, queue: JobQueue, claim: Claim) -> AsyncIterator[None]:
    """Keep the job through the block, unless it is lost; on the event loop."""

    async def hold() -> None:
        is_mine = True
        while is_mine:
            await asyncio.sleep(HOLD_EVERY_S)
            with suppress(Unavailable):
                is_mine = await database.run(partial(queue.hold, claim))

    holder = asyncio.create_task(hold(), name="job-lease")
    try:
        yield
    finally:
        holder.cancel()
        await asyncio.gather(holder, return_exceptions=True)
