"""Versions that are to be promoted only if they are better: compared through the running server."""

import asyncio
import json
import logging
import os
import secrets
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Final

from manylora.catalog.service import Catalog
from manylora.errors import NotFound, Unavailable
from manylora.files import remove_tree
from manylora.jobs.files import DataFiles
from manylora.jobs.leases import held
from manylora.jobs.queue import Claim, JobQueue
from manylora.settings import ENV_PREFIX
from manylora.tenants.gate import TenantGate

__all__ = ["MAX_JUDGE_S", "Judge"]

_MODULE: Final = "manylora.jobs.judge_process"
_LOOK_EVERY_S: Final = 2.0
_HOLD_EVERY_S: Final = 5.0  # which is also how soon a job that was cancelled is left
# Others wait meanwhile, and a tenant's own rate limit may make the rows come slowly.
MAX_JUDGE_S: Final = 7200.0
_log = logging.getLogger(__name__)


class Judge:
    """Runs beside the requests, on the event loop, from `start` to `aclose`.

    `address` is the server's own, at which it answers, `model` its base as `load_tokenizer` finds it.
    """

    def __init__(
        self, catalog: Catalog, gate: TenantGate, files: DataFiles, scratch: Path, *, address: str, model: str | None
    ) -> None:
        self._id = f"judge_{secrets.token_hex(8)}"
        self._catalog = catalog
        self._gate = gate
        self._files = files
        self._queue = JobQueue(catalog.database)
        self._scratch = scratch
        self._address = address
        self._model = model
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="job-judge")

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        look, last = partial(self._queue.claim_result, self._id, self._catalog.base, "judging"), ""
        while True:
            try:
                while (claim := await self._catalog.database.run(partial(look, after=last))) is not None:
                    last = claim.job.tenant
                    await self._judge(claim)
            except Unavailable as error:
                _log.warning("Versions cannot be judged now: %s", error.message)
            except Exception:  # noqa: BLE001 - one that cannot be judged holds up no other
                _log.exception("A version cannot be judged now.")
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _judge(self, claim: Claim) -> None:
        job, run = claim.job, self._catalog.database.run
        folder = self._scratch / f"{job.id}-judged"
        try:
            async with held(self._catalog.database, self._queue, claim):
                told = await self._told(claim, folder)
            with self._gate.lending(job.tenant, job.id) as key:
                found = await self._verdict(claim, {**told, "key": key})
        except NotFound as error:
            found = {"promoted": False, "said": f"{job.result['label']} was not promoted: {error.message}"}
        except Unavailable as error:
            found = {"fault": error.message, "is_passing": True}
        finally:
            await asyncio.to_thread(remove_tree, folder)
        if found is None:
            return
        if "fault" in found:
            _log.error("%s cannot be judged now: %s", job.id, found["fault"])
            await run(partial(self._queue.publish_later, claim, counts=not found["is_passing"]))
            return
        await run(partial(self._queue.judged, claim, found))

    async def _told(self, claim: Claim, folder: Path) -> dict[str, Any]:
        """What the process is told, but for the key; the rows go into the folder. Raises NotFound without them."""
        job, order = claim.job, claim.job.request["order"]
        file = await self._files.needed(job.tenant, str(job.validation_file))
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        data = folder / f"valid{file.suffix}"
        data.unlink(missing_ok=True)
        await self._files.fetch(file, data)
        return {
            "data": str(data),
            "adapters": [job.result["label"]],
            "server": self._address,
            "promote_if_better": job.request["metric"],
            "min_gain": job.request["min_gain"],
            "model": self._model,
            **{name: order[name] for name in ("render", "instruction", "max_length", "tool_prompt")},
        }

    async def _verdict(self, claim: Claim, told: dict[str, Any]) -> dict[str, Any] | None:
        """What the process says in the end; None where the job was lost meanwhile."""
        began = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", _MODULE,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # a traceback quotes what it was about: somebody's data
            start_new_session=True,
            env=_environment(),
        )  # fmt: skip
        saying = asyncio.create_task(process.communicate(json.dumps(told).encode() + b"\n"))
        try:
            while not (await asyncio.wait([saying], timeout=_HOLD_EVERY_S))[0]:
                if not await self._catalog.database.run(partial(self._queue.hold, claim)):
                    return None
                if time.monotonic() - began > MAX_JUDGE_S:
                    late = f"comparing it took more than {MAX_JUDGE_S:.0f} s. Hold fewer rows out."
                    return {"promoted": False, "said": f"{claim.job.result['label']} was not promoted: {late}"}
            said, _ = await saying
        finally:
            if process.returncode is None:
                process.kill()
            await asyncio.gather(saying, return_exceptions=True)
            await process.wait()
        if not said:
            return {"fault": f"the process ended with exit code {process.returncode}", "is_passing": False}
        found: dict[str, Any] = json.loads(said)
        return found


def _environment() -> dict[str, str]:
    """The process's: no setting of ours, and no proxy, which would learn the lent key and the rows."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(ENV_PREFIX) and not name.lower().endswith("_proxy")
    }
    return {**kept, "NO_PROXY": "*", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
