"""The jobs as workers see them: taken up in a fair order, held by a lease, handed in, each write on that condition.

A tenant's jobs take its virtual time, one after the other, each as much as its data and epochs say, divided by the
tenant's weight; the job whose span begins first is next (start-time fair queueing). A tenant that had none for a while
begins where the others are, so that nobody saves up turns and nobody who submits many holds up those who submit one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from sqlalchemy import case, delete, func, select, text
from sqlalchemy.orm import Session

from manylora.database.database import Database
from manylora.database.tables import MICROSECONDS, JobEventRow, JobRow, TenantRow, WorkerRow
from manylora.errors import Conflict
from manylora.jobs.board import WORKER_GONE_US
from manylora.jobs.records import ENDED, LIVE, Job, NewEvent, Status, add_event, job, now_in
from manylora.tenants.limits import limits_in
from manylora.usage.training import add_training, tokens_of_a_day

__all__ = ["LEASE_S", "MAX_PUT_OFF", "NOTHING", "Claim", "Failure", "JobQueue", "Spent", "Standing"]

LEASE_S: Final = 60.0
_LEASE_US: Final = int(LEASE_S) * MICROSECONDS
_TRY_AGAIN_US: Final = 10 * MICROSECONDS  # what could not be done now; twice as long after each time in a row
_MOST_WAIT_US: Final = 900 * MICROSECONDS
MAX_PUT_OFF: Final = 100  # times in a row, which take about a day
# A job that whoever ran it fell silent of so often takes its workers down with it.
_MOST_LOST: Final = 3
_FORGOTTEN_US: Final = 86_400 * MICROSECONDS
# Any fixed number: workers on one PostgreSQL database take turns on it.
_CLAIM_LOCK: Final = 7_217_002
Standing: TypeAlias = Literal["mine", "pause", "lost"]


@dataclass(frozen=True, slots=True)
class Claim:
    """A job that a worker has, in the run that it has it for."""

    job: Job
    worker: str

    @property
    def remains(self) -> str:
        """How the names begin, in the store, of what this run writes on its way."""
        return f"{self.job.place}/{self.job.run}"


@dataclass(frozen=True, slots=True)
class Spent:
    """What a job has taken by now, what it did in runs before included: tokens learnt from, and microseconds."""

    tokens: int
    microseconds: int


NOTHING: Final = Spent(0, 0)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a job has failed, as its tenant is told."""

    code: str
    message: str
    param: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, "param": self.param}


class JobQueue:
    """Methods block."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # workers

    def beat(self, worker: str, base: str) -> None:
        """The worker is there."""
        with self._database.write(None) as session:
            now = now_in(session)
            session.merge(WorkerRow(id=worker, base=base, last_seen=now))
            old = select(WorkerRow).where(WorkerRow.last_seen < now - _FORGOTTEN_US)
            for row in session.execute(old).scalars():
                session.delete(row)

    def leave(self, worker: str) -> None:
        """The worker has ended."""
        with self._database.write(None) as session:
            row = session.get(WorkerRow, worker)
            if row is not None:
                session.delete(row)

    def num_workers(self, base: str) -> int:
        """Workers for the base that were seen lately."""
        with self._database.read() as session:
            seen = WorkerRow.last_seen > now_in(session) - WORKER_GONE_US
            return session.execute(select(func.count()).where(WorkerRow.base == base, seen)).scalar_one()

    def claim(self, worker: str, base: str) -> Claim | None:
        """The next job for the base, which the worker has from now on; None where none waits."""
        with self._database.write(None) as session:
            if not self._database.is_sqlite:
                session.execute(text("SELECT pg_advisory_xact_lock(:n)"), {"n": _CLAIM_LOCK})
            now = now_in(session)
            _take_back(session, now)
            row = _next(session, base, now)
            if row is None:
                return None
            row.status, row.worker, row.run, row.lease_until = "running", worker, row.run + 1, now + _LEASE_US
            row.started, row.has_remains = row.started or now, True
            add_event(session, row.id, now, NewEvent("The job goes on." if row.run > 1 else "The job is running."))
            return Claim(job(row), worker)

    def standing(self, claim: Claim) -> Standing:
        """Whether the worker still has the job."""
        with self._database.read() as session:
            return _standing(session.get(JobRow, claim.job.id), claim)

    def renew(
        self,
        claim: Claim,
        events: Sequence[NewEvent] = (),
        *,
        step: int | None = None,
        remaining_s: float | None = None,
        spent: Spent = NOTHING,
    ) -> Standing:
        """Have the job for longer, and tell what happened; nothing is written where it was lost.

        Figures of steps that were told of before, by a run that this one has resumed, are not told again.
        """
        with self._database.write(None) as session:
            row = session.get(JobRow, claim.job.id, with_for_update=True)
            standing = _standing(row, claim)
            if row is None or standing == "lost":
                return "lost"
            now = now_in(session)
            row.lease_until = now + _LEASE_US
            for new in events:
                if new.step is None or new.step > row.step:
                    add_event(session, row.id, now, new)
            row.step = max(row.step, step or 0)
            _count(session, row, now, spent)
            if remaining_s is not None:
                row.estimated_finish = now + int(remaining_s * MICROSECONDS)
            return standing

    def plan(self, claim: Claim, tokens: int) -> bool:
        """So many tokens the job will learn from; False where it was lost, or has failed for want of quota.

        Each token counts once for a day, that of a job that was granted its tokens as if it had been learnt from
        already, whether it runs, waits for another worker or is paused; so it is asked for once.
        """
        with self._database.write(None) as session:
            row = _mine(session, claim)
            if row is None:
                return False
            if tokens <= row.planned_tokens:
                return True
            session.execute(select(TenantRow.name).where(TenantRow.name == row.tenant).with_for_update())
            now, most = now_in(session), limits_in(session, row.tenant).training_tokens_per_day
            is_open = JobRow.status.in_(("queued", "running", "paused")) & (JobRow.planned_tokens > 0)
            others = (JobRow.tenant == row.tenant) & is_open & (JobRow.id != row.id)
            open_tokens = func.coalesce(func.sum(JobRow.planned_tokens - JobRow.tokens), 0)
            taken = tokens_of_a_day(session, row.tenant, now)
            taken += int(session.execute(select(open_tokens).where(others)).scalar_one())
            needed = tokens - row.tokens
            if most is not None and taken + needed > most:
                message = (
                    f"The job needs {needed} training tokens, and the tenant '{row.tenant}' has {max(0, most - taken)} "
                    f"of {most} left for these 24 hours. Submit it again later, or with fewer rows or epochs."
                )
                _fail(session, row, now, Failure("quota_exceeded", message))
                return False
            row.planned_tokens = tokens
            return True

    def checkpoint(self, claim: Claim, name: str) -> bool:
        """From now on whoever takes the job up begins with this file of the store; False where it was lost."""
        with self._database.write(None) as session:
            row = _mine_or_left(session, claim)
            if row is not None:
                row.checkpoint = name
                _count_anew(row)
            return row is not None

    def put_back(self, claim: Claim, checkpoint: str | None) -> None:
        """The worker leaves off: the job is paused, if that was wished, or waits in front of its tenant's others."""
        with self._database.write(None) as session:
            row = _mine_or_left(session, claim)
            if row is None:
                return
            row.checkpoint = checkpoint or row.checkpoint
            _free(row, "paused" if row.wants_pause else "queued")
            message = "The job is paused." if row.status == "paused" else "Its worker stops; the job waits for another."
            add_event(session, row.id, now_in(session), NewEvent(message))

    def put_off(self, claim: Claim) -> None:
        """What the job needs cannot be had now: others go first, later each time, and it fails in the end."""
        with self._database.write(None) as session:
            row = _mine_or_left(session, claim)
            if row is None:
                return
            now = now_in(session)
            _free(row, "paused" if row.wants_pause else "queued")
            if _wait(row, now):
                said = "The job's files cannot be read, or what it writes cannot be stored, now: it waits for that."
                add_event(session, row.id, now, NewEvent(said, level="warn"))
            else:
                message = (
                    f"The job's files could not be read, or what it writes could not be stored, {MAX_PUT_OFF} times "
                    "in a row. Upload its files again; the server's log says more."
                )
                _fail(session, row, now, Failure("server_error", message))

    def hand_in(self, claim: Claim, result: Mapping[str, Any]) -> bool:
        """The job is trained, and what came out is in the store; False where it was lost."""
        with self._database.write(None) as session:
            row = _mine_or_left(session, claim)
            if row is None:
                return False
            _free(row, "publishing")
            _count_anew(row)
            row.result = dict(result)
            add_event(session, row.id, now_in(session), NewEvent("The training has ended; its adapter is published."))
            return True

    def fail(self, claim: Claim, failure: Failure) -> None:
        """The job has ended without a result."""
        with self._database.write(None) as session:
            row = _mine(session, claim)
            if row is not None:
                _fail(session, row, now_in(session), failure)

    def lose(self, claim: Claim) -> None:
        """Whoever ran the job has died of it: another try, or failed after several."""
        with self._database.write(None) as session:
            row = _mine(session, claim)
            if row is not None:
                _lost(session, row, now_in(session))

    # publication

    def claim_result(
        self, publisher: str, base: str, status: Status = "publishing", *, after: str = ""
    ) -> Claim | None:
        """A trained job that is to be published, or judged; the publisher has it from now on.

        The tenant `after` had the last turn: those behind it by name come first, and of each its oldest.
        """
        with self._database.read() as session:  # most often there is none, and nothing is to be written
            if session.execute(_due(status, base, now_in(session), after)).first() is None:
                return None
        with self._database.write(None) as session:
            now = now_in(session)
            row = session.execute(_due(status, base, now, after).with_for_update(skip_locked=True)).scalars().first()
            if row is None:
                return None
            row.worker, row.lease_until = publisher, now + _LEASE_US
            return Claim(job(row), publisher)

    def succeed(self, session: Session, claim: Claim, result: Mapping[str, Any]) -> None:
        """In the transaction that publishes. Raises Conflict where the job is not this publisher's any more."""
        row = session.get(JobRow, claim.job.id, with_for_update=True)
        if row is None or row.status != "publishing" or row.worker != claim.worker:
            raise Conflict("The job was cancelled, or another server publishes it.")
        now = now_in(session)
        row.result = {**row.result, **result}
        if row.request["activate"] == "if_better":
            _free(row, "judging")
            _count_anew(row)
            said = f"Published as {result['label']}, which is compared with what its name means now."
            add_event(session, row.id, now, NewEvent(said))
        else:
            _succeed(session, row, now)

    def hold(self, claim: Claim) -> bool:
        """Have a job for longer, in the status that it was claimed in; False where it was lost."""
        with self._database.write(None) as session:
            row = _mine(session, claim, status=claim.job.status)
            if row is not None:
                row.lease_until = now_in(session) + _LEASE_US
            return row is not None

    def judged(self, claim: Claim, promotion: Mapping[str, Any]) -> None:
        """The verdict on a published version, which ends its job: `promoted`, and why, as a sentence, `said`."""
        with self._database.write(None) as session:
            row = _mine(session, claim, status="judging")
            if row is None:
                return
            now = now_in(session)
            row.result = {**row.result, "promotion": dict(promotion)}
            level: Literal["info", "warn"] = "info" if promotion["promoted"] else "warn"
            add_event(session, row.id, now, NewEvent(str(promotion["said"]), level=level))
            _succeed(session, row, now)

    def publish_later(self, claim: Claim, *, counts: bool) -> None:
        """Publication, or a judgement, failed: another try, with `counts` few of them, else as `put_off`."""
        with self._database.write(None) as session:
            row = _mine(session, claim, status=claim.job.status)
            if row is None:
                return
            now = now_in(session)
            if counts:
                row.num_lost += 1
                row.lease_until = now + _TRY_AGAIN_US
                goes_on = row.num_lost < _MOST_LOST
            else:
                goes_on = _wait(row, now)
            if goes_on:
                return
            if row.status == "judging":
                said = "The version could not be compared, so it was not promoted. The server's log says why."
                row.result = {**row.result, "promotion": {"promoted": False, "said": said}}
                add_event(session, row.id, now, NewEvent(said, level="warn"))
                _succeed(session, row, now)
            else:
                message = "The adapter could not be published. The server's log says why."
                _fail(session, row, now, Failure("server_error", message))

    def fail_publication(self, claim: Claim, failure: Failure) -> None:
        """What came out cannot be published."""
        with self._database.write(None) as session:
            row = _mine(session, claim, status="publishing")
            if row is not None:
                _fail(session, row, now_in(session), failure)

    # afterwards

    def with_remains(self, limit: int) -> list[Job]:
        """Jobs that have ended, and whose way the store may still hold."""
        query = select(JobRow).where(JobRow.has_remains, JobRow.status.in_(ENDED))
        with self._database.read() as session:
            return [job(row) for row in session.execute(query.limit(limit)).scalars()]

    def forget_remains(self, job_id: str) -> None:
        """The store holds nothing of it any more."""
        with self._database.write(None) as session:
            session.get_one(JobRow, job_id).has_remains = False

    def forget_ended(self, kept_us: int, limit: int) -> int:
        """Forget jobs that ended so long ago, with what was told of them, and say how many; what they used stays.

        The one with the latest turn stays, too: it is what the virtual time is read from.
        """
        latest = select(func.max(JobRow.turn_from)).scalar_subquery()
        with self._database.read() as session:  # most often there is none; what has ended stays so
            is_old = JobRow.status.in_(ENDED) & (JobRow.finished < now_in(session) - kept_us) & ~JobRow.has_remains
            is_spare = JobRow.turn_from.is_(None) | (JobRow.turn_from < latest)
            query = select(JobRow.id).where(is_old, is_spare).order_by(JobRow.id).limit(limit)
            found = list(session.execute(query).scalars())
        if found:
            with self._database.write(None) as session:
                session.execute(delete(JobEventRow).where(JobEventRow.job.in_(found)))
                session.execute(delete(JobRow).where(JobRow.id.in_(found), ~JobRow.has_remains))
        return len(found)

    def counts(self, base: str) -> dict[str, int]:
        """How many jobs for the base have each status that is not an end."""
        query = select(JobRow.status, func.count()).where(JobRow.base == base, JobRow.status.in_(LIVE))
        with self._database.read() as session:
            return dict(session.execute(query.group_by(JobRow.status)).all())


def _due(status: Status, base: str, now: int, after: str) -> Any:
    due = (JobRow.status == status) & (JobRow.base == base) & (JobRow.lease_until < now)
    had_its_turn = case((JobRow.tenant > after, 0), else_=1)
    return select(JobRow).where(due).order_by(had_its_turn, JobRow.tenant, JobRow.created).limit(1)


def _mine(session: Session, claim: Claim, *, status: str = "running") -> JobRow | None:
    row = session.get(JobRow, claim.job.id, with_for_update=True)
    return row if row is not None and row.status == status and _standing(row, claim) != "lost" else None


def _mine_or_left(session: Session, claim: Claim) -> JobRow | None:
    """For a run that may have written to the store by now: where it has lost its job, that is still to be removed."""
    row = _mine(session, claim)
    if row is None and (lost := session.get(JobRow, claim.job.id)) is not None:
        lost.has_remains = True
    return row


def _standing(row: JobRow | None, claim: Claim) -> Standing:
    if row is None or row.worker != claim.worker or row.run != claim.job.run:
        return "lost"
    return "pause" if row.wants_pause else "mine"


def _count(session: Session, row: JobRow, now: int, spent: Spent) -> None:
    """Put on the bill what was not on it: steps that a run did again after a checkpoint are."""
    tokens, microseconds = max(row.tokens, spent.tokens), max(row.microseconds, spent.microseconds)
    name = row.request["name"]
    add_training(session, row.tenant, name, now, tokens - row.tokens, microseconds - row.microseconds)
    row.tokens, row.microseconds = tokens, microseconds


def _free(row: JobRow, status: str) -> None:
    row.status, row.worker, row.lease_until = status, None, 0
    row.wants_pause, row.estimated_finish = False, None


def _count_anew(row: JobRow) -> None:
    """Count attempts from none: the job has come further, so what it failed at before is behind it."""
    row.num_lost = row.num_put_off = 0


def _wait(row: JobRow, now: int) -> bool:
    """Let nobody take it up for a while, longer each time; False where that was so often enough."""
    row.lease_until = now + min(_TRY_AGAIN_US << min(row.num_put_off, 10), _MOST_WAIT_US)
    row.num_put_off += 1
    return row.num_put_off < MAX_PUT_OFF


def _succeed(session: Session, row: JobRow, now: int) -> None:
    _free(row, "succeeded")
    row.finished = now
    add_event(session, row.id, now, NewEvent(f"The job has succeeded: {row.result['label']}"))


def _fail(session: Session, row: JobRow, now: int, failure: Failure) -> None:
    _free(row, "failed")
    row.finished, row.error = now, failure.as_json()
    add_event(session, row.id, now, NewEvent(f"The job has failed: {failure.message}", level="error"))


def _lost(session: Session, row: JobRow, now: int) -> None:
    row.num_lost += 1
    if row.num_lost >= _MOST_LOST:
        message = f"The process that ran the job died {_MOST_LOST} times: memory may be short for it."
        _fail(session, row, now, Failure("worker_lost", message))
        return
    _free(row, "paused" if row.wants_pause else "queued")
    add_event(session, row.id, now, NewEvent("Its worker fell silent; the job waits for another.", level="warn"))


def _take_back(session: Session, now: int) -> None:
    """Jobs whose lease has run out wait again."""
    query = select(JobRow).where(JobRow.status == "running", JobRow.lease_until < now)
    for row in session.execute(query.with_for_update()).scalars().all():
        _lost(session, row, now)
    session.flush()


def _next(session: Session, base: str, now: int) -> JobRow | None:
    """The waiting job whose turn it is, with its turn set; see the module."""
    is_waiting = (JobRow.status == "queued") & (JobRow.base == base) & (JobRow.lease_until < now)
    by_tenant = select(JobRow.tenant, func.min(JobRow.created), func.min(JobRow.turn_from)).where(is_waiting)
    waiting = session.execute(by_tenant.group_by(JobRow.tenant)).all()
    if not waiting:
        return None
    each = JobRow.tenant
    under_way = select(each, func.count()).where(JobRow.status == "running").group_by(each)
    running = dict(session.execute(under_way).all())
    last = dict(session.execute(select(each, func.max(JobRow.turn_to)).group_by(each)).all())
    time = session.execute(select(func.max(JobRow.turn_from))).scalar_one() or 0.0
    turns = []
    for tenant, since, begun in waiting:  # whoever was put back has its turn already
        most = limits_in(session, tenant).max_jobs_running
        if most is None or running.get(tenant, 0) < most:
            turns.append((max(time, last.get(tenant) or 0.0) if begun is None else begun, since, tenant))
    if not turns:
        return None
    start, _, tenant = min(turns)
    first = (
        select(JobRow)
        .where(is_waiting, JobRow.tenant == tenant)
        .order_by(JobRow.turn_from.is_(None), JobRow.created, JobRow.id)
        .limit(1)
    )
    row = session.execute(first.with_for_update()).scalars().one_or_none()
    if row is not None and row.turn_from is None:  # None: its tenant has just taken it away
        row.turn_from, row.turn_to = start, start + row.cost / limits_in(session, tenant).weight
    return row
