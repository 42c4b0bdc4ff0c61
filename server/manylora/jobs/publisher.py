"""What comes out of jobs becomes versions, in the server: through all that an upload goes through, exactly once.

The job's end and the version are one transaction: whoever is killed before it leaves a job that is published later, and
whoever is killed after it leaves one that has succeeded.
"""

import asyncio
import logging
import secrets
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

from sqlalchemy.orm import Session

from manylora.catalog.records import Payer, Published, Wish
from manylora.catalog.service import Catalog
from manylora.catalog.upload import Brought
from manylora.database.tables import MICROSECONDS
from manylora.errors import Conflict, ManyloraError, StoreUnavailable, Unavailable
from manylora.identity import ADAPTER_FILES, CARD_FILE, Author
from manylora.jobs.files import DataFiles, make_whole
from manylora.jobs.leases import held
from manylora.jobs.order import REPORT_FILE
from manylora.jobs.queue import Claim, Failure, JobQueue
from manylora.metrics import Metrics

__all__ = ["Publisher"]

_LOOK_EVERY_S: Final = 1.0
_COUNT_EVERY: Final = 5  # looks
_SWEEP_EVERY: Final = 60
_SWEPT_AT_ONCE: Final = 20
_DAY_US: Final = 86_400 * MICROSECONDS
_log = logging.getLogger(__name__)


class Publisher:
    """Runs beside the requests, on the event loop, from `start` to `aclose`.

    `kept_days` after they ended, jobs are forgotten.
    """

    def __init__(
        self, catalog: Catalog, queue: JobQueue, files: DataFiles, metrics: Metrics, *, kept_days: float = 90.0
    ) -> None:
        self._id = f"publisher_{secrets.token_hex(8)}"
        self._catalog = catalog
        self._queue = queue
        self._files = files
        self._metrics = metrics
        self._last = ""  # whose job was published last
        self._kept_us = int(kept_days * _DAY_US)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="job-publisher")

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        look = 0
        while True:
            try:
                while await self.publish_next():
                    continue
                if look % _COUNT_EVERY == 0:
                    await self._count()
                if look % _SWEEP_EVERY == 0:
                    await self.sweep()
            except Unavailable:  # which is logged where it is found
                look -= 1
            except Exception:  # noqa: BLE001 - one that cannot be published holds up no other
                _log.exception("Jobs cannot be published or tidied now.")
            look += 1
            await asyncio.sleep(_LOOK_EVERY_S)

    async def publish_next(self) -> bool:
        """Publish what the job that has waited longest came to; whether there was one."""
        database = self._catalog.database
        look = partial(self._queue.claim_result, self._id, self._catalog.base, after=self._last)
        claim = await database.run(look)
        if claim is None:
            return False
        self._last = claim.job.tenant
        try:
            async with held(database, self._queue, claim):
                await self._publish(claim)
            self._metrics.count_published("succeeded")
        except Conflict as error:  # cancelled meanwhile, most often: then there is no later
            _log.info("%s is not published: %s", claim.job.id, error.message)
            await database.run(partial(self._queue.publish_later, claim, counts=True))
        except ManyloraError as error:
            self._metrics.count_published("refused" if error.status < 500 else "failed")
            if error.status < 500:
                failure = Failure(error.code, error.message, error.param)
                await database.run(partial(self._queue.fail_publication, claim, failure))
            else:
                _log.error("%s cannot be published now: %s", claim.job.id, error.message)
                counts = not isinstance(error, Unavailable)
                await database.run(partial(self._queue.publish_later, claim, counts=counts))
        return True

    async def _publish(self, claim: Claim) -> None:
        job = claim.job
        author = Author(**{**job.author, "note": f"fine-tuning job {job.id}"})

        async def receive(folder: Path) -> tuple[Wish, Brought]:
            await asyncio.to_thread(self._fetch, claim, folder)
            report = await self._files.add_result(job.tenant, f"{job.id}-{REPORT_FILE}", folder / REPORT_FILE)
            (folder / REPORT_FILE).unlink()
            wish = Wish(
                job.tenant,
                job.request["name"],
                activate=job.request["activate"] == "always",
                payer=Payer(job.tenant),
                author=author,
                also=partial(self._succeed, claim, report),
            )
            return wish, Brought(folder)

        await self._catalog.add(job.tenant, receive)

    def _fetch(self, claim: Claim, folder: Path) -> None:
        remains = claim.job.result["remains"]
        for name in (*ADAPTER_FILES, REPORT_FILE):
            if not self._catalog.store.fetch_file(f"{remains}-{name}", folder / name):
                raise StoreUnavailable(f"What {claim.job.id} came to is not in the store.")
        self._catalog.store.fetch_file(f"{remains}-{CARD_FILE}", folder / CARD_FILE)  # a worker of before kept none

    def _succeed(self, claim: Claim, report: str, session: Session, done: Published) -> None:
        make_whole(session, report)
        ref = done.version.ref
        found: dict[str, Any] = {"label": ref.label, "name": ref.name, "version": ref.version, "report": report}
        self._queue.succeed(session, claim, found)

    async def _count(self) -> None:
        if self._metrics.is_on:
            run = self._catalog.database.run
            counts = await run(partial(self._queue.counts, self._catalog.base))
            self._metrics.show_jobs(counts, await run(partial(self._queue.num_workers, self._catalog.base)))

    async def sweep(self) -> None:
        """Remove files that have expired, what jobs that have ended left in the store, and at last these jobs."""
        database = self._catalog.database
        await asyncio.to_thread(self._files.sweep)
        for job in await database.run(partial(self._queue.with_remains, _SWEPT_AT_ONCE)):
            await asyncio.to_thread(self._remove, job.place)
            await database.run(partial(self._queue.forget_remains, job.id))
        await database.run(partial(self._queue.forget_ended, self._kept_us, _SWEPT_AT_ONCE))

    def _remove(self, place: str) -> None:
        for name in self._catalog.store.names(place):
            with suppress(FileNotFoundError):
                self._catalog.store.erase(f"{place}/{name}")
