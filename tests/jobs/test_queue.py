"""The queue as workers see it, on SQLite and PostgreSQL: fair, and a job is one worker's at a time."""

import threading
import time
from collections import Counter
from functools import partial
from typing import Any

import pytest
from sqlalchemy import select, update

from manylora.database.database import Database
from manylora.database.tables import FileRow, JobEventRow, JobRow
from manylora.errors import Conflict, NotFound, QuotaExceeded
from manylora.identity import SERVER
from manylora.jobs import leases, records
from manylora.jobs import queue as queue_module
from manylora.jobs.board import Board, NewJob
from manylora.jobs.leases import held_by_thread
from manylora.jobs.order import Order
from manylora.jobs.queue import Claim, Failure, JobQueue, Spent
from manylora.jobs.records import Job, NewEvent
from manylora.tenants.limits import TenantStore
from manylora.usage.period import Period
from manylora.usage.report import make_report

PATIENCE_S = 60.0
FACTS = {"num_rows": 4, "shape": "completion", "labels": []}


@pytest.fixture
def queue(database: Database) -> JobQueue:
    return JobQueue(database)


@pytest.fixture
def board(database: Database) -> Board:
    return Board(database)


def submit(database: Database, tenant: str = "acme", *, size: int = 100, base: str = "base") -> Job:
    file_id = f"file-{tenant}-{size}"
    with database.write(None) as session:
        row = FileRow(
            id=file_id, tenant=tenant, filename="rows.jsonl", purpose="fine-tune", size_bytes=size, sha256="",
            facts=FACTS, is_whole=True, created=1, expires=None,
        )  # fmt: skip
        session.merge(row)
    said: dict[str, Any] = {"model": "tiny", "suffix": None, "metadata": {}}
    return Board(database).submit(NewJob(tenant, base, Order(), file_id, None, None, "never", None, 0.0, said, SERVER))


def claimed(queue: JobQueue, worker: str = "w1", base: str = "base") -> Claim:
    claim = queue.claim(worker, base)
    assert claim is not None
    return claim


def run_out(database: Database) -> None:
    """Every lease, at once."""
    with database.write(None) as session:
        session.execute(update(JobRow).values(lease_until=0))


def test_fifty_tenants_with_many_jobs_have_one_turn_after_the_other(database: Database, queue: JobQueue) -> None:
    names = [f"t{n:02}" for n in range(50)]
    for tenant in names:  # one after the other: who came first has no advantage but within a round
        for _ in range(3):
            submit(database, tenant)
    order = []
    while (claim := queue.claim("w1", "base")) is not None:
        order.append(claim.job.tenant)
        queue.fail(claim, Failure("x", "y"))

    assert [sorted(order[start : start + 50]) for start in (0, 50, 100)] == [names] * 3


def test_shares_follow_weight_and_size_and_nobody_saves_up_turns(database: Database, queue: JobQueue) -> None:
    TenantStore(database).change("heavy", weight=2.0)
    for tenant, size in (("heavy", 100), ("light", 100), ("large", 200)):
        for _ in range(8):
            submit(database, tenant, size=size)
    taken = [claimed(queue).job.tenant for _ in range(14)]
    assert Counter(taken) == {"heavy": 8, "light": 4, "large": 2}

    for _ in range(8):
        submit(database, "late")
    later = [claimed(queue).job.tenant for _ in range(6)]
    assert Counter(later)["late"] <= 4


def test_workers_never_share_a_job(database: Database, queue: JobQueue) -> None:
    jobs = {submit(database, f"t{n % 3}").id for n in range(12)}
    taken: list[str] = []

    def work(worker: str) -> None:
        while (claim := queue.claim(worker, "base")) is not None:
            taken.append(claim.job.id)

    threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(taken) == sorted(jobs)


def test_whoever_fell_silent_writes_nothing_any_more(database: Database, queue: JobQueue, board: Board) -> None:
    job = submit(database)
    assert queue.claim("w1", "another base") is None
    first = claimed(queue)
    assert queue.renew(first, [NewEvent("Step 1/9", step=1)], step=1) == "mine"
    assert queue.checkpoint(first, "jobs/x/1-checkpoint")
    run_out(database)

    second = claimed(queue, "w2")

    assert (second.job.id, second.job.run, second.job.checkpoint) == (job.id, 2, "jobs/x/1-checkpoint")
    assert queue.standing(first) == queue.renew(first, [NewEvent("Step 2/9", step=2)], step=2) == "lost"
    assert not queue.checkpoint(first, "jobs/x/other")
    assert not queue.hand_in(first, {})
    queue.fail(first, Failure("x", "y"))
    queue.put_back(first, None)
    assert board.get("acme", job.id).status == "running"
    assert queue.renew(second, [NewEvent("Step 1/9", step=1), NewEvent("Step 2/9", step=2)], step=2) == "mine"
    told = [event.message for event in board.events("acme", job.id, 50, None)[0]]
    assert told.count("Step 1/9") == told.count("Step 2/9") == 1, "a step is told of once"
    assert queue.hand_in(second, {"steps": 9})
    assert board.get("acme", job.id).status == "publishing"


def test_a_job_that_kills_its_workers_fails(database: Database, queue: JobQueue, board: Board) -> None:
    job = submit(database)
    for _ in range(3):
        claimed(queue)
        run_out(database)
    assert queue.claim("w1", "base") is None

    found = board.get("acme", job.id)
    assert (found.status, found.error["code"]) == ("failed", "worker_lost")


def test_what_a_job_failed_at_is_forgotten_once_it_has_come_further(database: Database, queue: JobQueue) -> None:
    submit(database)
    for run in range(1, 6):
        claim = claimed(queue)
        assert claim.job.run == run
        assert queue.checkpoint(claim, "jobs/x/1-checkpoint")
        queue.lose(claim)


def test_a_job_whose_files_cannot_be_read_holds_nobody_up(
    database: Database, queue: JobQueue, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_module, "MAX_PUT_OFF", 3)
    stuck = submit(database)
    queue.put_off(claimed(queue))
    other = submit(database, "other")
    assert board.get("acme", stuck.id).status == "queued"
    assert claimed(queue).job.id == other.id
    assert queue.claim("w1", "base") is None, "it waits"

    for _ in range(2):
        run_out(database)
        queue.put_off(next(claim for claim in iter(partial(claimed, queue), None) if claim.job.id == stuck.id))

    found = board.get("acme", stuck.id)
    assert (found.status, found.error["code"]) == ("failed", "server_error")
    assert "3 times" in found.error["message"]


@pytest.mark.parametrize("counts", [True, False])
def test_what_cannot_be_published_is_tried_only_so_often(
    database: Database, queue: JobQueue, board: Board, monkeypatch: pytest.MonkeyPatch, counts: bool
) -> None:
    monkeypatch.setattr(queue_module, "MAX_PUT_OFF", 3)
    job = submit(database)
    queue.lose(claimed(queue))
    assert queue.hand_in(claimed(queue), {})
    for _ in range(3):
        run_out(database)
        claim = queue.claim_result("p1", "base")
        assert claim is not None, "what its training died of does not count any more"
        queue.publish_later(claim, counts=counts)
    assert board.get("acme", job.id).status == "failed"


def test_tenants_take_turns_at_being_published_and_judged(database: Database, queue: JobQueue) -> None:
    for tenant in ("busy", "busy", "busy", "one", "a"):
        submit(database, tenant)
    while (claim := queue.claim("w1", "base")) is not None:
        assert queue.hand_in(claim, {})
    order, last = [], ""
    while (claim := queue.claim_result("p1", "base", after=last)) is not None:
        last = claim.job.tenant
        order.append(last)
    assert order == ["a", "busy", "one", "busy", "busy"]


def test_a_run_that_has_lost_its_job_is_swept_again(database: Database, queue: JobQueue, board: Board) -> None:
    for write in (
        lambda claim: queue.checkpoint(claim, "x"),
        lambda claim: queue.put_back(claim, "x"),
        lambda claim: queue.hand_in(claim, {}),
        queue.put_off,
    ):
        job = submit(database)
        claim = claimed(queue)
        board.cancel("acme", job.id)
        queue.forget_remains(job.id)
        write(claim)
        assert [left.id for left in queue.with_remains(9)] == [job.id]
        queue.forget_remains(job.id)


def test_ended_jobs_are_forgotten_with_their_events_and_turns_go_on(
    database: Database, queue: JobQueue, board: Board
) -> None:
    jobs = [submit(database, tenant) for tenant in ("acme", "other", "acme")]
    for _ in jobs:
        queue.fail(claimed(queue), Failure("x", "y"))
    waiting = submit(database)
    assert queue.forget_ended(0, 9) == 0, "the store may hold something of them"
    for job in jobs:
        queue.forget_remains(job.id)
    assert queue.forget_ended(10**15, 9) == 0, "it is not long ago"

    assert queue.forget_ended(-1, 1) == 1
    assert queue.forget_ended(-1, 9) == 1, "the last one's turn is where the others' begin"

    left, _ = board.page("acme", 9, None)
    assert waiting.id in [job.id for job in left]
    with database.read() as session:
        kept = set(session.execute(select(JobRow.id)).scalars())
        assert set(session.execute(select(JobEventRow.job)).scalars()) == kept
        assert len(kept) == 2
    assert claimed(queue).job.id == waiting.id
    with database.read() as session:
        row = session.get_one(JobRow, waiting.id)
        assert row.turn_from is not None
        assert row.turn_from > 0


def test_a_job_is_held_through_what_takes_long(
    database: Database, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "HOLD_EVERY_S", 0.01)
    submit(database)
    claim = claimed(queue)
    run_out(database)
    with held_by_thread(queue, claim):
        until = time.monotonic() + PATIENCE_S
        while _lease(database, claim) == 0 and time.monotonic() < until:
            time.sleep(0.01)
    assert _lease(database, claim) > 0


def _lease(database: Database, claim: Claim) -> int:
    with database.read() as session:
        return session.get_one(JobRow, claim.job.id).lease_until


def test_pausing_and_going_on(database: Database, queue: JobQueue, board: Board) -> None:
    job = submit(database)
    assert board.pause("acme", job.id).status == "paused"
    assert queue.claim("w1", "base") is None
    assert board.resume("acme", job.id).status == "queued"
    claim = claimed(queue)
    assert board.pause("acme", job.id).status == "running"
    assert queue.standing(claim) == "pause"
    told = board.events("acme", job.id, 50, None)
    assert board.pause("acme", job.id).wants_pause
    assert board.events("acme", job.id, 50, None) == told, "nothing has changed"
    assert board.resume("acme", job.id).status == "running"
    assert queue.standing(claim) == "mine"
    board.pause("acme", job.id)
    queue.put_back(claim, "jobs/x/1-checkpoint")
    assert board.get("acme", job.id).status == "paused"
    submit(database)
    board.resume("acme", job.id)
    again = claimed(queue)
    assert (again.job.id, again.job.checkpoint) == (job.id, "jobs/x/1-checkpoint"), "it has had its turn"


def test_cancelling_takes_the_job_from_whoever_has_it(database: Database, queue: JobQueue, board: Board) -> None:
    job = submit(database)
    claim = claimed(queue)
    with pytest.raises(NotFound):
        board.cancel("other", job.id)
    assert board.cancel("acme", job.id).status == "cancelled"
    assert queue.standing(claim) == "lost"
    assert not queue.hand_in(claim, {})
    for change in (board.cancel, board.pause, board.resume):
        with pytest.raises(Conflict, match="cancelled"):
            change("acme", job.id)


def test_quotas_of_jobs(database: Database, queue: JobQueue) -> None:
    TenantStore(database).change("acme", max_jobs_running=1, max_jobs_queued=2)
    submit(database)
    submit(database)
    with pytest.raises(QuotaExceeded, match="jobs that wait"):
        submit(database)
    first = claimed(queue)
    assert queue.claim("w1", "base") is None
    submit(database)
    queue.fail(first, Failure("x", "y"))
    assert claimed(queue).job.tenant == "acme"


def test_tokens_are_counted_once_and_bounded_by_the_day(database: Database, queue: JobQueue, board: Board) -> None:
    TenantStore(database).change("acme", training_tokens_per_day=1000)
    first, second, third = [submit(database) for _ in range(3)]
    claim = claimed(queue)
    assert queue.plan(claim, 600)
    queue.renew(claim, spent=Spent(200, 5_000_000))
    queue.renew(claim, spent=Spent(200, 5_000_000))
    run_out(database)
    again = claimed(queue, "w2")
    assert queue.renew(claim, spent=Spent(400, 9_000_000)) == "lost"
    queue.renew(again, spent=Spent(100, 2_000_000))  # from a checkpoint
    queue.renew(again, spent=Spent(300, 7_000_000))
    assert again.job.id == first.id

    other = claimed(queue)
    assert not queue.plan(other, 500), "600 are planned, of which 300 are learnt"
    failed = board.get("acme", second.id)
    assert (other.job.id, failed.status, failed.error["code"]) == (second.id, "failed", "quota_exceeded")
    assert "needs 500 training tokens" in failed.error["message"]
    assert "has 400 of 1000 left" in failed.error["message"]
    fits = claimed(queue)
    assert (fits.job.id, queue.plan(fits, 400)) == (third.id, True)
    queue.renew(fits, spent=Spent(400, 1_000_000))

    made = make_report(database, Period(None, None), ("tenant",), tenant=None, now_us=0)
    assert (made.total.training_tokens, made.total.training_us) == (700, 8_000_000)
    assert [names for names, _ in made.lines] == [{"tenant": "acme"}]
    assert make_report(database, Period(None, None), (), tenant="x", now_us=0).total.training_tokens == 0


def test_a_job_that_is_paused_keeps_the_tokens_that_it_was_granted(
    database: Database, queue: JobQueue, board: Board
) -> None:
    TenantStore(database).change("acme", training_tokens_per_day=1000)
    first, second = submit(database), submit(database)
    claim = claimed(queue)
    assert queue.plan(claim, 600)
    board.pause("acme", first.id)
    queue.put_back(claim, None)
    other = claimed(queue)
    assert other.job.id == second.id
    assert not queue.plan(other, 500), "600 are granted"

    TenantStore(database).change("acme", training_tokens_per_day=500)
    board.resume("acme", first.id)
    again = claimed(queue)
    assert again.job.id == first.id
    assert queue.plan(again, 600), "it is not asked for again"


def test_events_are_numbered_for_each_job_and_the_oldest_are_forgotten(
    database: Database, queue: JobQueue, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_EVENTS", 4)
    first, second = submit(database), submit(database, "other")
    claim = claimed(queue)
    assert claim.job.id == first.id
    queue.renew(claim, [NewEvent(f"Step {n}/9", step=n) for n in (1, 2, 3)], step=3)

    numbers = [event.number for event in board.events("acme", first.id, 50, None)[0]]
    assert numbers == [7, 6, 5, 4], "three of its beginning, one of its claim, three of steps"
    assert [event.number for event in board.events("other", second.id, 50, None)[0]] == [3, 2, 1]


def test_workers_come_and_go(database: Database, queue: JobQueue) -> None:
    queue.beat("w1", "base")
    queue.beat("w2", "base")
    queue.beat("w1", "base")
    assert (queue.num_workers("base"), queue.num_workers("other")) == (2, 0)
    queue.leave("w1")
    assert queue.num_workers("base") == 1
