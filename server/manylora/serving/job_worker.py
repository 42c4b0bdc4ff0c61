"""The worker that a server starts beside itself (`--jobs`), in a process of its own that ends with it."""

import asyncio
import os
import sys
from contextlib import suppress
from typing import Final

from manylora.jobs.worker_process import Assignment
from manylora.log import get_logger
from manylora.settings import ENV_PREFIX

__all__ = ["JobWorker"]

_MODULE: Final = "manylora.jobs.worker_process"
_AGAIN_AFTER_S: Final = 5.0
# To finish a step of each job and keep its checkpoint.
_PATIENCE_S: Final = 60.0
_log = get_logger("manylora.jobs")


class JobWorker:
    """Used on the event loop, from `start` to `aclose`. A worker that ends by itself is started again."""

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="job-worker")

    async def aclose(self) -> None:
        """Let the worker put back what it has, for a minute at most, and end."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        process = self._process
        if process is None or process.returncode is not None:
            return
        assert process.stdin is not None
        process.stdin.close()
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _PATIENCE_S)
        if process.returncode is None:
            process.kill()
            await process.wait()

    async def _run(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
        while True:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", _MODULE,
                stdin=asyncio.subprocess.PIPE,
                start_new_session=True,  # a key pressed in the server's terminal is not meant for it
                env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
            )  # fmt: skip
            assert self._process.stdin is not None
            self._process.stdin.write(self._assignment.as_line())
            code = await self._process.wait()
            _log.error("job_worker_ended", exit_code=code, again_in_s=_AGAIN_AFTER_S)
            await asyncio.sleep(_AGAIN_AFTER_S)
