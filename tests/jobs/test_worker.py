"""A worker that is killed, and one that is asked to end: the job goes on elsewhere, to the same adapter bit for bit."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import update

from manylora.catalog.store import open_store
from manylora.database.database import Database, open_database
from manylora.database.tables import FileRow, JobRow
from manylora.errors import StoreUnavailable
from manylora.identity import SERVER, TENSOR_FILE
from manylora.jobs.board import Board, NewJob
from manylora.jobs.order import Order
from manylora.jobs.queue import JobQueue
from manylora.jobs.records import Job
from manylora.jobs.worker import Place, Worker
from manylora.jobs.worker_process import Assignment
from manylora.lifecycle.train.config import LoraShape, Schedule
from manylora.lifecycle.train.train import train
from manylora.settings import Settings
from tests.lifecycle.helpers import label_rows, write_rows

PATIENCE_S = 300.0
ORDER = Order(LoraShape(rank=4, dropout=0.2), Schedule(epochs=3, lr=1e-2, checkpoint_every=2, seed=7), max_length=128)


@pytest.fixture
def store_url(request: pytest.FixtureRequest) -> str | None:
    """The store that a test names; a folder of its own where it names none."""
    return f"{request.getfixturevalue('s3')}/store" if getattr(request, "param", "") == "s3" else None


@pytest.fixture
def settings(settings: Settings, tiny_llama_dir: Path, store_url: str | None) -> Settings:
    return settings.model_copy(update={"model": str(tiny_llama_dir), "store_url": store_url})


@pytest.fixture
def opened(settings: Settings) -> Database:
    return open_database(settings.resolved_database_url)


@pytest.fixture
def job(settings: Settings, opened: Database, tmp_path: Path) -> Job:
    """A job that waits, with its file in the store."""
    store = open_store(settings.resolved_store_url, settings.data_dir / "cache")
    rows = write_rows(tmp_path / "rows.jsonl", label_rows())
    store.keep_file("files/file-1", rows)
    store.close()
    digest = hashlib.sha256(rows.read_bytes()).hexdigest()
    file = FileRow(
        id="file-1", tenant="acme", filename="rows.jsonl", purpose="fine-tune", is_whole=True, created=1, expires=None,
        size_bytes=rows.stat().st_size, sha256=digest,
        facts={"num_rows": 32, "shape": "label", "labels": ["fruit", "tool"]},
    )  # fmt: skip
    with opened.write(None) as session:
        session.add(file)
    said: dict[str, Any] = {"model": "tiny", "suffix": None, "metadata": {}}
    new = NewJob("acme", "base", ORDER, "file-1", None, "words", "never", None, 0.0, said, SERVER)
    return Board(opened).submit(new)


def started(settings: Settings, *moment: str) -> "subprocess.Popen[bytes]":
    assignment = replace(Assignment.of(settings, seats=1, base="base"), log_level="info")
    command = [sys.executable, "-m", "tests.jobs.worker_child", json.dumps(asdict(assignment)), *moment]
    return subprocess.Popen(command, env={**os.environ, "PID_FILE": str(settings.data_dir.parent / "pid")})


def ended(worker: "subprocess.Popen[bytes]", tmp_path: Path) -> int:
    """Its exit status, once it and the child that waited, if one did, have ended."""
    code = worker.wait(PATIENCE_S)
    told = tmp_path / "pid"
    if told.exists():
        until = time.monotonic() + PATIENCE_S
        while not has_ended(int(told.read_text())) and time.monotonic() < until:
            time.sleep(0.05)
        assert has_ended(int(told.read_text()))
        told.unlink()
    return code


def has_ended(pid: int) -> bool:
    """Whether nothing runs any more, though nobody may have asked for its exit status yet."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def undisturbed(job: Job, tmp_path: Path, base: Path) -> bytes:
    folder = tmp_path / "undisturbed"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes((tmp_path / "rows.jsonl").read_bytes())
    train(Order.of(job.request["order"]).config(folder, base=str(base), title="words", device="cpu", threads=1))
    return (folder / "adapter" / TENSOR_FILE).read_bytes()


@pytest.mark.parametrize("store_url", ["folder", pytest.param("s3", marks=pytest.mark.slow)], indirect=True)
def test_a_worker_is_killed_and_the_adapter_is_that_of_an_undisturbed_run(
    settings: Settings, opened: Database, job: Job, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    board = Board(opened)
    assert ended(started(settings, "after a checkpoint"), tmp_path) == -signal.SIGKILL
    found = board.get("acme", job.id)
    assert (found.status, found.run) == ("running", 1)
    assert found.checkpoint
    with opened.write(None) as session:  # as if a minute had gone by, and with it the time of the file
        session.execute(update(JobRow).values(lease_until=0))
        session.execute(update(FileRow).values(expires=1))

    assert ended(started(settings, "without checkpoints"), tmp_path) == 0

    done = board.get("acme", job.id)
    assert (done.status, done.run, done.result["steps"]) == ("publishing", 2, 12)
    store = open_store(settings.resolved_store_url, settings.data_dir / "cache")
    assert store.fetch_file(f"{done.result['remains']}-{TENSOR_FILE}", tmp_path / "made")
    assert (tmp_path / "made").read_bytes() == undisturbed(job, tmp_path, tiny_llama_dir)
    for name in store.names(job.place):
        store.erase(f"{job.place}/{name}")
    assert not store.names(job.place)
    store.close()
    steps = [event.data["step"] for event in board.events("acme", job.id, 100, None)[0] if event.type == "metrics"]
    assert steps == list(range(12, 0, -1)), "each step is told of once"
    assert list((settings.data_dir / "workers").iterdir()) == []


def test_a_worker_that_is_asked_to_end_puts_its_job_back(
    settings: Settings, opened: Database, job: Job, tmp_path: Path
) -> None:
    board = Board(opened)
    worker = started(settings, "when it is paused")
    until = time.monotonic() + PATIENCE_S
    while board.get("acme", job.id).step < 2 and time.monotonic() < until:
        time.sleep(0.05)
    (child,) = [each for each in psutil.Process(worker.pid).children() if "tests.jobs.waiting_child" in each.cmdline()]
    assert child.nice() == 19
    assert not any(name.startswith("MANYLORA_") for name in child.environ())

    board.pause("acme", job.id)
    while board.get("acme", job.id).status != "paused" and time.monotonic() < until:
        time.sleep(0.05)

    assert ended(worker, tmp_path) == 0
    found = board.get("acme", job.id)
    assert (found.status, found.worker) == ("paused", None)
    assert (settings.data_dir / "store" / found.checkpoint).stat().st_size > 0


def test_a_job_whose_file_is_damaged_waits_and_no_worker_stays_with_it(
    settings: Settings, opened: Database, job: Job, tmp_path: Path
) -> None:
    store = open_store(settings.resolved_store_url, settings.data_dir / "cache")
    (tmp_path / "rows.jsonl").write_text("other rows")
    store.keep_file("files/file-1", tmp_path / "rows.jsonl")
    queue = JobQueue(opened)
    claim = queue.claim("w1", "base")
    assert claim is not None
    worker = Worker(opened, store, Place("base", None, "cpu", 1, tmp_path), seats=1)

    with pytest.raises(StoreUnavailable, match="damaged"):
        worker._work(claim, threading.Event())

    assert Board(opened).get("acme", job.id).status == "queued"
    assert queue.claim("w1", "base") is None
    store.close()
