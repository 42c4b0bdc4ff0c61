"""The jobs as their tenants see them: submitted, listed, cancelled, paused, followed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import func, select, tuple_
from sqlalchemy.orm import Session

from manylora.catalog import queries
from manylora.database.database import Database
from manylora.database.tables import MICROSECONDS, JobEventRow, JobRow, TenantRow, VersionRow, WorkerRow
from manylora.errors import Conflict, InvalidRequest, NotFound, QuotaExceeded, quoted
from manylora.identity import AdapterRef, Author
from manylora.jobs.files import find_file
from manylora.jobs.order import Activate, Order
from manylora.jobs.records import (
    FINE_TUNE,
    DataFile,
    Event,
    Job,
    NewEvent,
    add_event,
    data_file,
    event,
    job,
    new_job_id,
    now_in,
)
from manylora.lifecycle.data.rows import WRITTEN
from manylora.lifecycle.parameters import InvalidParameter, renamed
from manylora.lifecycle.train.start import check_start
from manylora.tenants.limits import limits_in

__all__ = ["LABEL_METRICS", "MAX_JUDGED_ROWS", "TEXT_METRICS", "Board", "NewJob"]

TEXT_METRICS: Final = ("exact_match", "valid_json", "perplexity")
LABEL_METRICS: Final = (
    "accuracy", "macro_precision", "macro_recall", "macro_f1", "mentioned", "exact_match", "perplexity",
)  # fmt: skip

MAX_JUDGED_ROWS: Final = 10_000  # of a file that versions are compared on, through the server
WORKER_GONE_US: Final = 30 * MICROSECONDS
# What the tenant asks for is not the worker's fault, and a quota is free again when a job ends.
_RETRY_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class NewJob:
    """What a tenant submits. `name` None: its id makes one. `said` is the request as answers repeat it.

    `start` is the version whose weights the training goes on from; None: it begins with the base.
    """

    tenant: str
    base: str
    order: Order
    training_file: str
    validation_file: str | None
    name: str | None
    activate: Activate
    metric: str | None
    min_gain: float
    said: Mapping[str, Any]
    author: Author
    start: AdapterRef | None = None


class Board:
    """Methods block."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def check_start(self, ref: AdapterRef, folder_of: Callable[[AdapterRef], Path]) -> None:
        """Whether a job can go on from the version. Takes its files out of the store, so from a worker thread.

        Raises InvalidRequest, NotFound for a version that is gone, or what `folder_of` does.
        """
        with self._database.read() as session:
            _start(session, ref)
        try:
            check_start(folder_of(ref))
        except InvalidParameter as error:
            raise InvalidRequest(renamed(error.message, {"start": f"'{ref.label}'"}), param="model") from None

    def submit(self, new: NewJob) -> Job:
        """Put a job into the queue. Raises InvalidRequest, NotFound for a file, or QuotaExceeded."""
        with self._database.write(None) as session:
            session.execute(select(TenantRow.name).where(TenantRow.name == new.tenant).with_for_update())
            train_set = _data(session, new.tenant, new.training_file, "training_file")
            held_out = None
            if new.validation_file is not None:
                held_out = _data(session, new.tenant, new.validation_file, "validation_file")
            _check_data(train_set, held_out, new.order.method)
            start = None if new.start is None else _start(session, new.start)
            metric = _metric(new, held_out)
            _check_queue(session, new.tenant)
            job_id = new_job_id()
            name = new.name or f"ft-{job_id[-6:]}"
            queries.check_kept(session, new.tenant, queries.find_adapter(session, new.tenant, name), 0)
            now = now_in(session)
            row = JobRow(
                id=job_id, tenant=new.tenant, status="queued", base=new.base, author=asdict(new.author),
                request={"said": dict(new.said), "order": new.order.as_json(), "name": name, "activate": new.activate,
                         "metric": metric, "min_gain": new.min_gain, "start": start},
                training_file=new.training_file, validation_file=new.validation_file,
                cost=float(max(1, train_set.size_bytes) * new.order.schedule.epochs), created=now, started=None,
                finished=None, turn_from=None, turn_to=None, worker=None, lease_until=0, run=0, num_lost=0,
                wants_pause=False, checkpoint="", step=0, estimated_finish=None, result={}, error={},
                has_remains=False,
            )  # fmt: skip
            session.add(row)
            add_event(session, job_id, now, NewEvent(f"Created fine-tuning job: {job_id}"))
            add_event(session, job_id, now, NewEvent(_checked_words(train_set, held_out)))
            if not _has_workers(session, new.base, now):
                message = "No worker runs now: the job waits until the server is started with --jobs, or a worker is."
                add_event(session, job_id, now, NewEvent(message, level="warn"))
            return job(row)

    def get(self, tenant: str, job_id: str) -> Job:
        """The tenant's job. Raises NotFound."""
        with self._database.read() as session:
            return job(_find(session, tenant, job_id))

    def page(self, tenant: str, limit: int, after: str | None) -> tuple[Sequence[Job], bool]:
        """The tenant's jobs newest first, behind `after`, and whether there are more. Raises InvalidRequest."""
        query = select(JobRow).where(JobRow.tenant == tenant)
        with self._database.read() as session:
            if after is not None:
                start = session.get(JobRow, after)
                if start is None or start.tenant != tenant:
                    raise InvalidRequest(f"'after' is no job of yours: '{quoted(after)}'.", param="after")
                query = query.where(tuple_(JobRow.created, JobRow.id) < tuple_(start.created, start.id))
            ordered = query.order_by(JobRow.created.desc(), JobRow.id.desc())
            rows = session.execute(ordered.limit(limit + 1)).scalars().all()
            return [job(row) for row in rows[:limit]], len(rows) > limit

    def events(self, tenant: str, job_id: str, limit: int, after: int | None) -> tuple[Sequence[Event], bool]:
        """What was told of the tenant's job, newest first, behind the event `after`. Raises NotFound."""
        query = select(JobEventRow).where(JobEventRow.job == job_id)
        query = query if after is None else query.where(JobEventRow.number < after)
        with self._database.read() as session:
            _find(session, tenant, job_id)
            rows = session.execute(query.order_by(JobEventRow.number.desc()).limit(limit + 1)).scalars().all()
            return [event(row) for row in rows[:limit]], len(rows) > limit

    def cancel(self, tenant: str, job_id: str) -> Job:
        """End the job at once: whoever runs it finds that it has lost it. Raises NotFound or Conflict."""
        with self._database.write(None) as session:
            row = _find(session, tenant, job_id, for_change=True)
            _expect(row, "cancelled", "queued", "running", "publishing", "judging", "paused")
            now = now_in(session)
            stays = f" {row.result['label']} stays." if row.status == "judging" else ""
            row.status, row.finished, row.worker, row.estimated_finish = "cancelled", now, None, None
            add_event(session, job_id, now, NewEvent(f"The job was cancelled.{stays}"))
            return job(row)

    def pause(self, tenant: str, job_id: str) -> Job:
        """Leave off, at once or as soon as the step that runs is done. Raises NotFound or Conflict."""
        with self._database.write(None) as session:
            row = _find(session, tenant, job_id, for_change=True)
            _expect(row, "paused", "queued", "running")
            if row.status == "running":
                if not row.wants_pause:
                    row.wants_pause = True
                    add_event(session, job_id, now_in(session), NewEvent("The job will pause after this step."))
            else:
                row.status = "paused"
                add_event(session, job_id, now_in(session), NewEvent("The job is paused."))
            return job(row)

    def resume(self, tenant: str, job_id: str) -> Job:
        """Put a paused job back into the queue. Raises NotFound or Conflict."""
        with self._database.write(None) as session:
            row = _find(session, tenant, job_id, for_change=True)
            if row.status == "running" and row.wants_pause:
                row.wants_pause = False
            else:
                _expect(row, "resumed", "paused")
                row.status = "queued"
            add_event(session, job_id, now_in(session), NewEvent("The job goes on."))
            return job(row)


def _find(session: Session, tenant: str, job_id: str, *, for_change: bool = False) -> JobRow:
    """Raises NotFound: for another tenant's, too."""
    row = session.get(JobRow, job_id, with_for_update=True if for_change else None)
    if row is None or row.tenant != tenant:
        raise NotFound(f"There is no fine-tuning job '{quoted(job_id)}'. GET /v1/fine_tuning/jobs lists yours.")
    return row


def _expect(row: JobRow, done: str, *statuses: str) -> None:
    if row.status not in statuses:
        raise Conflict(f"The job is {row.status}, so it cannot be {done}.")


def _data(session: Session, tenant: str, file_id: str, param: str) -> DataFile:
    """Raises InvalidRequest for a file that is not there or holds no data."""
    try:
        found = data_file(find_file(session, tenant, file_id))
    except NotFound as error:
        raise InvalidRequest(error.message, param=param) from None
    if found.purpose != FINE_TUNE:
        raise InvalidRequest(f"'{param}' has the purpose '{found.purpose}', and no data to learn from.", param=param)
    return found


def _start(session: Session, ref: AdapterRef) -> dict[str, Any]:
    """What the job keeps of the version that it goes on from. Raises InvalidRequest for one that it cannot."""
    row = session.get(VersionRow, ref.id)
    if row is None:
        raise NotFound(f"The adapter '{ref.label}' was deleted.")
    if row.kind != "lora" or row.mix or row.virtual_tokens or row.invocation or row.head or row.vocabulary:
        what = f"a head for {row.head}" if row.head else "tokens of its own" if row.vocabulary else row.kind
        raise InvalidRequest(
            f"'{ref.label}' is no plain low-rank adapter ({what}), and only those are gone on from.", param="model"
        )
    return {"id": row.id, "label": ref.label, "rank": row.rank}


def _check_data(train_set: DataFile, held_out: DataFile | None, method: str) -> None:
    """Raises InvalidRequest for what training would refuse of these files."""
    facts = train_set.facts
    if facts["shape"] not in WRITTEN:
        raise InvalidRequest(
            f"'training_file' has {facts['shape']} rows, from which nothing is written. Jobs train what writes; "
            "`manylora train --task` trains the rest.",
            param="training_file",
        )
    if (facts["shape"] == "preference") != (method == "dpo"):
        raise InvalidRequest(
            f"'training_file' has {facts['shape']} rows. Preferences ('preferred_output', 'non_preferred_output') are "
            "learnt by 'method' dpo, and all other rows by supervised.",
            param="method.type",
        )
    if facts["shape"] == "label" and facts["labels"] is not None and len(facts["labels"]) < 2:
        raise InvalidRequest("'training_file' has only one label: a classifier needs two.", param="training_file")
    if held_out is None:
        return
    if held_out.facts["shape"] != facts["shape"]:
        raise InvalidRequest(
            f"'validation_file' has {held_out.facts['shape']} rows, 'training_file' has {facts['shape']} rows.",
            param="validation_file",
        )
    known, used = facts["labels"], held_out.facts["labels"]
    unseen = sorted(set(used) - set(known)) if known is not None and used is not None else []
    if unseen:
        shown = ", ".join(unseen[:5])
        raise InvalidRequest(
            f"'validation_file' has labels that 'training_file' lacks: {shown}.", param="validation_file"
        )


def _metric(new: NewJob, held_out: DataFile | None) -> str | None:
    """By what a version is judged, None where it is not. Raises InvalidRequest for one that does not fit the rows."""
    if new.activate != "if_better":
        return None
    if held_out is None:
        message = "'if_better' compares versions on 'validation_file': send one."
        raise InvalidRequest(message, param="manylora.activate")
    if held_out.facts["num_rows"] > MAX_JUDGED_ROWS:
        message = f"'if_better' compares versions on at most {MAX_JUDGED_ROWS} rows: hold fewer out."
        raise InvalidRequest(message, param="validation_file")
    if held_out.facts["shape"] == "preference":
        message = (
            "'if_better' compares answers, and no preferences: say 'never' or 'always', or try the version on a share."
        )
        raise InvalidRequest(message, param="manylora.activate")
    has_labels = held_out.facts["shape"] == "label"
    metric = new.metric or ("accuracy" if has_labels else "perplexity")
    if metric not in (LABEL_METRICS if has_labels else TEXT_METRICS):
        message = f"'manylora.metric' {metric} does not fit {held_out.facts['shape']} rows."
        raise InvalidRequest(message, param="manylora.metric")
    return metric


def _check_queue(session: Session, tenant: str) -> None:
    most = limits_in(session, tenant).max_jobs_queued
    if most is None:
        return
    waiting = select(func.count()).where(JobRow.tenant == tenant, JobRow.status.in_(("queued", "paused")))
    count = session.execute(waiting).scalar_one()
    if count >= most:
        message = f"The tenant '{tenant}' has used up its quota of jobs that wait ({count} of {most}). Cancel one."
        raise QuotaExceeded(message, retry_after_s=_RETRY_S)


def _checked_words(train_set: DataFile, held_out: DataFile | None) -> str:
    text = f"Files validated: {train_set.facts['num_rows']} rows to learn from"
    return text if held_out is None else f"{text}, {held_out.facts['num_rows']} held out"


def _has_workers(session: Session, base: str, now: int) -> bool:
    query = select(WorkerRow.id).where(WorkerRow.base == base, WorkerRow.last_seen > now - WORKER_GONE_US)
    return session.execute(query.limit(1)).first() is not None
