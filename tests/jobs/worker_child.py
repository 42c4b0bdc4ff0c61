"""A worker that keeps every checkpoint, and that ends itself with SIGKILL at a moment that it is told."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from manylora.catalog.local_store import LocalStore
from manylora.catalog.remote_store import RemoteStore
from manylora.errors import StoreUnavailable
from manylora.jobs import worker
from manylora.jobs.queue import JobQueue
from manylora.jobs.worker_process import Assignment, work


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **named: Any) -> Any:
        method(*args, **named)
        die()

    return call


def until_idle(claim: Callable[..., Any], stop: threading.Event) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        found = claim(*args)
        if found is None:
            stop.set()
        return found

    return call


def without_checkpoints(keep: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, name: str, path: Any) -> Any:
        if "checkpoint" in name:
            raise StoreUnavailable("No checkpoint can be stored.")
        return keep(self, name, path)

    return call


def main() -> None:
    """`ASSIGNMENT MOMENT`; without a moment it works until there is nothing left to do."""
    stop = threading.Event()
    worker._CHECKPOINT_S = 0.0  # type: ignore[misc]
    moment = sys.argv[2] if len(sys.argv) > 2 else ""
    if moment in ("after a checkpoint", "when it is paused"):
        worker._CHILD = "tests.jobs.waiting_child"  # type: ignore[misc]
        os.environ["WAIT"] = moment
    if moment == "after a checkpoint":
        JobQueue.checkpoint = after(JobQueue.checkpoint)  # type: ignore[method-assign]
    if moment == "without checkpoints":
        for store in (LocalStore, RemoteStore):
            store.keep_file = without_checkpoints(store.keep_file)  # type: ignore[method-assign]
    JobQueue.claim = until_idle(JobQueue.claim, stop)  # type: ignore[method-assign]
    work(Assignment(**json.loads(sys.argv[1])), stop)


if __name__ == "__main__":
    main()
