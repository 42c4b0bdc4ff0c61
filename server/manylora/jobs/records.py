"""Files of data, jobs and what is told of them, as frozen copies of rows. Times are Unix microseconds."""

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Final, Literal, TypeAlias

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from manylora.database.replicas import NOW
from manylora.database.tables import MICROSECONDS, FileRow, JobEventRow, JobRow

__all__ = [
    "ENDED",
    "FINE_TUNE",
    "LIVE",
    "MAX_EVENTS",
    "RESULTS",
    "DataFile",
    "Event",
    "Job",
    "NewEvent",
    "Status",
    "add_event",
    "data_file",
    "event",
    "job",
    "new_file_id",
    "new_job_id",
    "now_in",
]

MAX_EVENTS: Final = 2000  # of a job; a run tells of about a thousand steps
FINE_TUNE: Final = "fine-tune"
RESULTS: Final = "fine-tune-results"
# `publishing`: trained, and not yet a version; `judging`: a version that is compared with what its name means.
Status: TypeAlias = Literal["queued", "running", "publishing", "judging", "paused", "succeeded", "failed", "cancelled"]
ENDED: Final = ("succeeded", "failed", "cancelled")
LIVE: Final = ("queued", "running", "publishing", "judging", "paused")


@dataclass(frozen=True, slots=True)
class DataFile:
    """A tenant's file; `facts` say what was found in its rows (`lifecycle.data.data.Facts`)."""

    id: str
    tenant: str
    filename: str
    purpose: str
    size_bytes: int
    sha256: str
    facts: Mapping[str, Any]
    created: int
    expires: int | None

    @property
    def suffix(self) -> str:
        """The end of its name, which says how its rows are written."""
        return PurePath(self.filename).suffix.lower()

    @property
    def place(self) -> str:
        """The file's name in the store."""
        return f"files/{self.id}"


@dataclass(frozen=True, slots=True)
class Job:
    """One job. `run` is the how manieth time it was taken up; `estimated_finish` is known while it runs.

    `tokens` and `microseconds` are what it has taken by now, `planned_tokens` all that it learns from, 0 before that
    is known.
    """

    id: str
    tenant: str
    status: Status
    base: str
    request: Mapping[str, Any]
    author: Mapping[str, Any]
    training_file: str
    validation_file: str | None
    created: int
    started: int | None
    finished: int | None
    worker: str | None
    run: int
    wants_pause: bool
    checkpoint: str
    step: int
    planned_tokens: int
    tokens: int
    microseconds: int
    estimated_finish: int | None
    result: Mapping[str, Any]
    error: Mapping[str, Any]

    @property
    def place(self) -> str:
        """The folder in the store of what it writes on its way."""
        return f"jobs/{self.id}"


@dataclass(frozen=True, slots=True)
class Event:
    """What is told of a job, numbered from 1 in the order of its telling."""

    number: int
    created: int
    level: str
    type: str
    message: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class NewEvent:
    """What is to be told. With a `step`, what came of that step of the training, its figures unless said otherwise."""

    message: str
    level: Literal["info", "warn", "error"] = "info"
    data: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None
    is_figures: bool = True

    @property
    def type(self) -> Literal["message", "metrics"]:
        return "message" if self.step is None or not self.is_figures else "metrics"


def new_file_id() -> str:
    return f"file-{secrets.token_hex(12)}"


def new_job_id() -> str:
    return f"ftjob-{secrets.token_hex(12)}"


def now_in(session: Session) -> int:
    """The time that all who share the database agree on: the database's own, of SQLite this machine's."""
    if session.get_bind().dialect.name == "sqlite":
        return time.time_ns() * MICROSECONDS // 10**9
    now: int = session.execute(select(NOW)).scalar_one()
    return now


def add_event(session: Session, job_id: str, now: int, new: NewEvent) -> None:
    """Tell of a job whose row the transaction has locked; the oldest event is forgotten where there are too many."""
    last = session.execute(select(func.max(JobEventRow.number)).where(JobEventRow.job == job_id)).scalar_one()
    number = (last or 0) + 1
    row = JobEventRow(
        job=job_id, number=number, created=now, level=new.level, type=new.type,
        message=new.message, data=dict(new.data),
    )  # fmt: skip
    session.add(row)
    if number > MAX_EVENTS:
        old = (JobEventRow.job == job_id) & (JobEventRow.number <= number - MAX_EVENTS)
        session.execute(delete(JobEventRow).where(old))


def data_file(row: FileRow) -> DataFile:
    return DataFile(**{name: getattr(row, name) for name in DataFile.__slots__})


def job(row: JobRow) -> Job:
    return Job(**{name: getattr(row, name) for name in Job.__slots__})


def event(row: JobEventRow) -> Event:
    return Event(**{name: getattr(row, name) for name in Event.__slots__})
