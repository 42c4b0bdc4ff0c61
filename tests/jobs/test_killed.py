"""SIGKILL of the server, of its worker, of both and of the processes that train and judge, at each phase of a job.

Afterwards the next one goes on: the job ends with one version, which has the bytes of a job that nobody disturbed, is
active as was asked for, and is paid for once. A version that is to be better is judged and promoted once.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from manylora.catalog.base_signature import signature_of
from manylora.catalog.store import open_store
from manylora.database.database import Database, open_database
from manylora.database.tables import AdapterRow, ChangeRow, FileRow, JobRow, TrainingUsageRow, VersionRow
from manylora.identity import SERVER, TENSOR_FILE
from manylora.jobs.board import Board, NewJob
from manylora.jobs.order import Activate, Order
from manylora.jobs.records import Job
from manylora.lifecycle.train.config import LoraShape, Schedule
from manylora.models.offered import modules_of
from manylora.settings import Settings
from tests.jobs.killed_child import ENDED, ONE_HAS_DIED
from tests.lifecycle.helpers import label_rows, write_rows

_ROOT = Path(__file__).resolve().parents[2]
ORDER = Order(LoraShape(rank=4, dropout=0.2), Schedule(epochs=3, lr=1e-2, checkpoint_every=2, seed=7), max_length=128)


def hook(at: str, when: str, word: str = "", **more: Any) -> dict[str, Any]:
    return {"at": f"manylora.{at}", "when": when, "word": word, "in": "life", **more}


# By phase, in the order in which a job comes through them.
WORKING = {
    "it is taken up": hook("jobs.queue:JobQueue.claim", "after", "Claim("),
    "its files are there": hook("jobs.worker:Worker._prepare", "after"),
    "its rows become tokens": hook("jobs.worker:_Run._hear", "before", "'kind': 'report'"),
    "it is planned": hook("jobs.worker:_Run._hear", "before", "'kind': 'plan'"),
    "its first step": hook("jobs.worker:_Run._hear", "before", "'kind': 'step'"),
    "a checkpoint is stored": hook("catalog.local_store:LocalStore.keep_file", "before", "checkpoint", waits=True),
    "a checkpoint was stored": hook("catalog.local_store:LocalStore.keep_file", "after", "checkpoint", waits=True),
    "a checkpoint is told of": hook("jobs.queue:JobQueue.checkpoint", "after", waits=True),
    "it is trained": hook("jobs.worker:_Run._hand_in", "before"),
    "half of it is handed in": hook("catalog.local_store:LocalStore.keep_file", "after", "adapter_model"),
    "all of it is": hook("jobs.queue:JobQueue.hand_in", "before"),
    "which is written down": hook("jobs.queue:JobQueue.hand_in", "after"),
}
PUBLISHING = {
    "it is to be published": hook("jobs.queue:JobQueue.claim_result", "after", "Claim("),
    "its adapter is fetched": hook("jobs.publisher:Publisher._fetch", "after"),
    "its files are kept": hook("catalog.local_store:LocalStore.put", "after"),
    "it is about to be a version": hook("catalog.registry:Registry.publish", "before"),
    "in the transaction": hook("jobs.queue:JobQueue.succeed", "after"),
    "it is a version": hook("catalog.registry:Registry.publish", "after"),
}
JUDGING = {
    "it is to be judged": hook("jobs.queue:JobQueue.claim_result", "after", "status='judging'"),
    "its rows are fetched": hook("jobs.judge:Judge._verdict", "before"),
    "the judge has begun": hook("jobs.judge_process:_judged", "before") | {"in": "judge"},
    "it asks": hook("lifecycle.evaluate.contenders:ServerContenders.answers", "after") | {"in": "judge"},
    "it is better": hook("lifecycle.evaluate.command:promote", "before") | {"in": "judge"},
    "it is promoted": hook("lifecycle.evaluate.command:promote", "after") | {"in": "judge"},
    "the verdict is known": hook("jobs.queue:JobQueue.judged", "before"),
    "which is written down": hook("jobs.queue:JobQueue.judged", "after"),
}


@pytest.fixture(scope="module")
def settings(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(data_dir=tmp_path_factory.mktemp("killed") / "data", model=str(tiny_llama_dir))


@pytest.fixture(scope="module")
def opened(settings: Settings) -> Iterator[Database]:
    opened = open_database(settings.resolved_database_url)
    store = open_store(settings.resolved_store_url, settings.data_dir / "cache")
    for file_id, chosen in (("file-1", label_rows()), ("file-2", label_rows()[::2])):
        rows = write_rows(settings.data_dir / "rows.jsonl", chosen)
        store.keep_file(f"files/{file_id}", rows)
        file = FileRow(
            id=file_id, tenant="public", filename="rows.jsonl", purpose="fine-tune", is_whole=True, created=1,
            expires=None, size_bytes=rows.stat().st_size, sha256=hashlib.sha256(rows.read_bytes()).hexdigest(),
            facts={"num_rows": len(chosen), "shape": "label", "labels": ["fruit", "tool"]},
        )  # fmt: skip
        with opened.write(None) as session:
            session.add(file)
    store.close()
    yield opened
    opened.close()


class Lives:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def run(self, *hooks: dict[str, Any]) -> int:
        """The server's exit status, once all processes of a life have ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(hooks) + "\n")
        self._process.stdin.flush()
        return int(json.loads(self._process.stdout.readline())["status"])


@pytest.fixture(scope="module")
def lives(settings: Settings, opened: Database) -> Iterator[Lives]:
    told = {"data_dir": str(settings.data_dir), "model": settings.model}
    command = [sys.executable, "-m", "tests.jobs.killed_child", json.dumps(told), str(settings.data_dir / "fork")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=_ROOT, text=True, env=environment, **pipes) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == {"ready": True}
        yield Lives(process)
        assert process.stdin is not None
        process.stdin.close()


def submitted(settings: Settings, opened: Database, name: str, *, is_judged: bool = False) -> Job:
    said: dict[str, Any] = {"model": "tiny", "suffix": None, "metadata": {}}
    base = signature_of(modules_of(settings.model)).value
    activate: Activate = "if_better" if is_judged else "always"
    held_out, metric = ("file-2", "accuracy") if is_judged else (None, None)
    new = NewJob("public", base, ORDER, "file-1", held_out, name, activate, metric, 0.0, said, SERVER)
    return Board(opened).submit(new)


def judged_once(settings: Settings, opened: Database, job: Job) -> None:
    """The job's version was found better, said so once and made active by one change."""
    published(settings, opened, job)
    promotion = Board(opened).get("public", job.id).result["promotion"]
    events = Board(opened).events("public", job.id, 1000, None)[0]
    verdicts = [event.message for event in events if "promoted" in event.message or "active version" in event.message]
    assert (promotion["promoted"], verdicts) == (True, [promotion["said"]])
    with opened.read() as session:
        changes = select(ChangeRow.to_version).where(ChangeRow.name == job.request["name"], ChangeRow.to_version > 0)
        assert list(session.execute(changes).scalars()) == [1]
    assert list((settings.data_dir / "judged").iterdir()) == []


def later(opened: Database) -> None:
    """As if a minute had gone by: who is dead has lost what it held. How often that was counts for nothing here."""
    with opened.write(None) as session:
        session.execute(update(JobRow).values(lease_until=0, num_lost=0))


@pytest.fixture(scope="module")
def undisturbed(settings: Settings, opened: Database, lives: Lives) -> bytes:
    job = submitted(settings, opened, "undisturbed")
    assert lives.run() == ENDED
    return published(settings, opened, job)


def published(settings: Settings, opened: Database, job: Job) -> bytes:
    """The weights of the only version that came of the job, which is active, told of step by step and paid for once."""
    found = Board(opened).get("public", job.id)
    assert found.status == "succeeded", found.error
    name = job.request["name"]
    with opened.read() as session:
        versions = select(AdapterRow.active_version, VersionRow.version, VersionRow.blob).join_from(
            AdapterRow, VersionRow
        )
        active, number, blob = session.execute(versions.where(AdapterRow.name == name)).one()
        used = session.execute(select(TrainingUsageRow.tokens).where(TrainingUsageRow.adapter == name)).scalars().all()
        reports = select(FileRow.id).where(FileRow.filename.startswith(job.id), FileRow.is_whole)
        assert list(session.execute(reports).scalars()) == [found.result["report"]]
    assert (found.result["label"], number, active) == (f"{name}@1", 1, 1)
    assert sum(used) == found.tokens == found.planned_tokens
    events = Board(opened).events("public", job.id, 1000, None)[0]
    assert [event.data["step"] for event in events if event.type == "metrics"] == list(range(12, 0, -1))
    return (settings.data_dir / "store" / blob[:2] / blob / TENSOR_FILE).read_bytes()


def survive(settings: Settings, opened: Database, lives: Lives, name: str, hooks: dict[str, dict[str, Any]]) -> bytes:
    """A job of whose processes some are killed at one moment after the other."""
    job = submitted(settings, opened, name)
    for moment, hook in hooks.items():
        assert lives.run(hook) == (-signal.SIGKILL if "server" in hook["kills"] else ONE_HAS_DIED), moment
        later(opened)
    assert lives.run() == ENDED
    assert list((settings.data_dir / "workers").iterdir()) == []
    return published(settings, opened, job)


def with_victims(hooks: dict[str, dict[str, Any]], *victims: str) -> dict[str, dict[str, Any]]:
    return {moment: {**hook, "kills": victims} for moment, hook in hooks.items()}


def test_the_worker_is_killed(settings: Settings, opened: Database, lives: Lives, undisturbed: bytes) -> None:
    assert survive(settings, opened, lives, "worker", with_victims(WORKING, "worker")) == undisturbed


def test_the_server_is_killed(settings: Settings, opened: Database, lives: Lives, undisturbed: bytes) -> None:
    some = {moment: {**WORKING[moment], "until_stopped": True} for moment in ("it is planned", "its first step")}
    some |= {"which is written down": WORKING["which is written down"]}
    assert survive(settings, opened, lives, "server", with_victims(some | PUBLISHING, "server")) == undisturbed


def test_both_are_killed(settings: Settings, opened: Database, lives: Lives, undisturbed: bytes) -> None:
    some = {moment: (WORKING | PUBLISHING)[moment] for moment in (
        "its first step", "a checkpoint is told of", "half of it is handed in", "which is written down",
        "its files are kept", "in the transaction", "it is a version",
    )}  # fmt: skip
    assert survive(settings, opened, lives, "both", with_victims(some, "server", "worker")) == undisturbed


def test_the_process_that_trains_is_killed(
    settings: Settings, opened: Database, lives: Lives, undisturbed: bytes, tmp_path: Path
) -> None:
    job = submitted(settings, opened, "trainer")
    dies = [
        hook(at, when, **{"in": "trainer"}, kills=["trainer"], once=str(tmp_path / f"{at}-{when}"))
        for at, when in (
            ("lifecycle.train.train:encode", "after"),
            ("lifecycle.train.train:save_checkpoint", "before"),
        )
    ]
    assert lives.run(*dies) == ENDED
    assert len(list(tmp_path.iterdir())) == len(dies)
    assert published(settings, opened, job) == undisturbed


def test_who_judges_is_killed(settings: Settings, opened: Database, lives: Lives, tmp_path: Path) -> None:
    job = submitted(settings, opened, "judge", is_judged=True)
    moments = {moment: JUDGING[moment] for moment in ("it asks", "it is promoted")}
    dies = [{**hook, "kills": ["judge"], "once": str(tmp_path / moment)} for moment, hook in moments.items()]
    assert lives.run(*dies) == ENDED
    assert len(list(tmp_path.iterdir())) == len(dies)
    judged_once(settings, opened, job)


def test_the_server_is_killed_while_it_judges(settings: Settings, opened: Database, lives: Lives) -> None:
    job = submitted(settings, opened, "judged", is_judged=True)
    for moment, hook in JUDGING.items():
        victims = ["server", "judge"] if moment in ("it asks", "it is promoted") else ["server"]
        assert lives.run({**hook, "kills": victims}) == -signal.SIGKILL, moment
        later(opened)
    assert lives.run() == ENDED
    judged_once(settings, opened, job)
