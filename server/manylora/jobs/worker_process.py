"""A worker as a process: what it is told, and its end."""

import json
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Self

from manylora.catalog.store import check_store_exists, open_store
from manylora.database.database import check_exists, open_database
from manylora.errors import InvalidRequest, StartupError
from manylora.jobs.worker import Place, Worker, base_of, scratch_folder
from manylora.lifecycle.extras import check_there
from manylora.log import configure_logging
from manylora.settings import Settings

__all__ = ["Assignment", "check_packages", "main", "stop_on_signals", "work"]


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker works for, and with. `base` None is found out from the model."""

    data_dir: str
    database_url: str
    database_timeout_s: float
    store_url: str
    model: str | None
    base: str | None
    seats: int
    threads: int
    device: str
    log_level: str
    log_json: bool

    @classmethod
    def of(cls, settings: Settings, *, seats: int, base: str | None = None) -> Self:
        return cls(
            data_dir=str(settings.data_dir),
            database_url=settings.resolved_database_url,
            database_timeout_s=settings.database_timeout_s,
            store_url=settings.resolved_store_url,
            model=settings.model,
            base=base,
            seats=seats,
            threads=settings.job_threads,
            device=settings.job_device,
            log_level=settings.log_level,
            log_json=settings.log_json,
        )

    def as_line(self) -> bytes:
        """For the standard input of `main`: it holds the database's password, which a command line would show."""
        return json.dumps(asdict(self)).encode() + b"\n"


def work(assignment: Assignment, stop: threading.Event) -> None:
    """Take jobs up until `stop` is set; what is under way is put back with its checkpoint. Raises StartupError."""
    check_packages()
    check_exists(assignment.database_url)
    check_store_exists(assignment.store_url)
    base = assignment.base or base_of(assignment.model)
    data_dir = Path(assignment.data_dir)
    database = open_database(assignment.database_url, assignment.database_timeout_s)
    try:
        store = open_store(assignment.store_url, data_dir / "cache", is_exclusive=False)
        with scratch_folder(data_dir) as scratch:
            place = Place(base, assignment.model, assignment.device, assignment.threads, scratch)
            Worker(database, store, place, seats=assignment.seats).run(stop)
        store.close()
    finally:
        database.close()


def check_packages() -> None:
    """Raises StartupError where a package is missing without which nothing can be trained."""
    try:
        check_there("peft", "matplotlib")
    except InvalidRequest as error:
        raise StartupError(error.message) from None


def stop_on_signals() -> threading.Event:
    """Set by SIGTERM and SIGINT. Called on the main thread."""
    stop = threading.Event()

    def ask(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    return stop


def main() -> None:
    """The worker of a server, which says on standard input what to work for, and whose end is that of this process."""
    stop = stop_on_signals()
    assignment = Assignment(**json.loads(sys.stdin.buffer.readline()))
    configure_logging(level=assignment.log_level, as_json=assignment.log_json)

    def wait_for_the_end() -> None:
        sys.stdin.buffer.read()
        stop.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    work(assignment, stop)


if __name__ == "__main__":
    main()
