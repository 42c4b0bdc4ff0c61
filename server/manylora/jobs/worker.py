"""A worker: takes jobs up, has each trained by a process of its own, and hands in what comes out.

It may be killed at any time. What it held is taken up by another one once its lease has run out, from the last
checkpoint that reached the store, and comes to the same adapter, bit for bit on one thread.
"""

import json
import logging
import os
import queue
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from manylora.catalog.files import FolderLock
from manylora.catalog.store import Store
from manylora.database.database import Database
from manylora.database.tables import MICROSECONDS, VersionRow
from manylora.errors import (
    AdapterLoadFailed,
    ManyloraError,
    NotFound,
    StartupError,
    StorageFull,
    StoreUnavailable,
    Unavailable,
)
from manylora.files import remove_tree
from manylora.identity import ADAPTER_FILES, CARD_FILE
from manylora.jobs.files import fetch_file, find_needed_file
from manylora.jobs.leases import held_by_thread
from manylora.jobs.order import ORDER_FILE, REPORT_FILE, START_FOLDER
from manylora.jobs.queue import LEASE_S, NOTHING, Claim, Failure, JobQueue, Spent
from manylora.jobs.records import Job, NewEvent, data_file
from manylora.lifecycle.output import checkpoint_path, report_folder
from manylora.lifecycle.parameters import renamed
from manylora.settings import ENV_PREFIX

__all__ = ["Place", "Worker", "base_of", "scratch_folder"]

_CHILD: Final = "manylora.jobs.child"
_TICK_S: Final = 1.0
_IDLE_S: Final = 2.0
_BEAT_S: Final = 5.0
_RENEW_S: Final = LEASE_S / 6
_CHECKPOINT_S: Final = 60.0
_MOST_METRICS: Final = 1000  # events with figures of one run
_FAULT_WAIT_S: Final = 5.0
# What `manylora train` calls its parameters, and a job's request calls otherwise.
_NAMES: Final = {
    "data": "training_file",
    "eval_data": "validation_file",
    "epochs": "n_epochs",
    "lr": "learning_rate_multiplier",
}
# Figures of a training from preferences, as events call them, which have those of a step as `train_…`.
_PREFERENCE: Final = {
    "margin": "train_margin",
    "preferred": "train_preferred",
    "eval_margin": "valid_margin",
    "eval_preferred": "valid_preferred",
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker trains: the base, the device, CPU threads for each job, a folder of its own."""

    base: str
    model: str | None
    device: str
    threads: int
    scratch: Path


def base_of(model: str | None) -> str:
    """The signature of the base, found in a process that can be spared: this one stays small. Raises StartupError."""
    done = subprocess.run(
        [sys.executable, "-m", _CHILD, "--base", model or ""], stdout=subprocess.PIPE, env=_environment(1), check=False
    )
    last = done.stdout.decode().splitlines()[-1:]
    told = (
        json.loads(last[0]) if last else {"message": f"Reading the base model ended with exit code {done.returncode}."}
    )
    if "base" not in told:
        raise StartupError(str(told["message"]))
    return str(told["base"])


@contextmanager
def scratch_folder(data_dir: Path) -> Iterator[Path]:
    """A folder for one worker, and those of workers that were killed are removed."""
    root = data_dir / "workers"
    mine = root / secrets.token_hex(8)
    lock = FolderLock(mine)
    try:
        for other in root.iterdir():
            if other != mine:
                with suppress(StartupError):  # of a worker that runs
                    left = FolderLock(other)
                    remove_tree(other)
                    left.release()
        yield mine
    finally:
        remove_tree(mine)
        lock.release()


class Worker:
    """Takes up as many jobs at a time as it has seats, until `stop` is set; `run` returns once all are put back."""

    def __init__(self, database: Database, store: Store, place: Place, *, seats: int) -> None:
        self.id = f"worker_{secrets.token_hex(8)}"
        self._database = database
        self._store = store
        self._place = place
        self._queue = JobQueue(database)
        self._seats = seats

    def run(self, stop: threading.Event) -> None:
        seats = [threading.Thread(target=self._sit, args=(stop,), name=f"seat-{n}") for n in range(self._seats)]
        for seat in seats:
            seat.start()
        while not stop.is_set():
            with self._faults(stop):
                self._queue.beat(self.id, self._place.base)
            stop.wait(_BEAT_S)
        for seat in seats:
            seat.join()
        with suppress(ManyloraError):
            self._queue.leave(self.id)

    def _sit(self, stop: threading.Event) -> None:
        while not stop.is_set():
            claim = None
            with self._faults(stop):
                claim = self._queue.claim(self.id, self._place.base)
            if claim is None:
                stop.wait(_IDLE_S)
                continue
            with self._faults(stop):
                self._work(claim, stop)

    def _work(self, claim: Claim, stop: threading.Event) -> None:
        folder = self._place.scratch / f"{claim.job.id}-{claim.job.run}"
        try:
            folder.mkdir(mode=0o700)
            with held_by_thread(self._queue, claim):
                self._prepare(claim, folder)
            _Run(self._queue, self._store, self._place, claim, folder).go(stop)
        except NotFound as error:  # of a file that has gone
            self._queue.fail(claim, Failure(error.code, error.message))
        except Unavailable:
            self._queue.put_off(claim)
            raise
        finally:
            remove_tree(folder)

    def _prepare(self, claim: Claim, folder: Path) -> None:
        """The data, the order and, of a job that was begun, the checkpoint."""
        job = claim.job
        for file_id, name in ((job.training_file, "train"), (job.validation_file, "valid")):
            if file_id is not None:
                with self._database.read() as session:
                    file = data_file(find_needed_file(session, job.tenant, file_id))
                fetch_file(self._store, file, folder / f"{name}{file.suffix}")
        if job.request.get("start"):
            self._fetch_start(job, folder / START_FOLDER)
        told = {
            "order": job.request["order"], "base": self._place.model, "title": job.request["name"],
            "device": self._place.device, "threads": self._place.threads, "command": f"fine-tuning job {job.id}",
        }  # fmt: skip
        (folder / ORDER_FILE).write_text(json.dumps(told), encoding="utf-8")
        if job.checkpoint and not self._store.fetch_file(job.checkpoint, checkpoint_path(folder / "adapter")):
            _log.warning("The checkpoint of %s is not in the store: it begins again.", job.id)

    def _fetch_start(self, job: Job, folder: Path) -> None:
        """The version that the training goes on from. Raises NotFound where it was deleted, or Unavailable."""
        start = job.request["start"]
        with self._database.read() as session:
            version = session.get(VersionRow, start["id"])
            if version is None:
                raise NotFound(f"The adapter {start['label']}, which the job goes on from, was deleted.")
            blob = version.blob
        try:
            files = self._store.local_folder(blob)
        except AdapterLoadFailed as error:
            raise StoreUnavailable(f"The files of {start['label']} cannot be read: {error.message}") from error
        folder.mkdir()
        for name in ADAPTER_FILES:
            shutil.copyfile(files / name, folder / name)

    @contextmanager
    def _faults(self, stop: threading.Event) -> Iterator[None]:
        """Whatever fails, the worker goes on: the job of it is taken up again when its lease has run out."""
        try:
            yield
        except Unavailable as error:
            _log.warning("%s", error.message)
            stop.wait(_FAULT_WAIT_S)
        except Exception:  # noqa: BLE001 - see above
            _log.exception("A worker failed at its work.")
            stop.wait(_FAULT_WAIT_S)


@dataclass(slots=True)
class _News:
    """What the child has said since it was last passed on."""

    events: list[NewEvent] = field(default_factory=list)
    step: int | None = None
    remaining_s: float | None = None
    spent: Spent = NOTHING
    planned_tokens: int | None = None
    has_checkpoint: bool = False
    last: dict[str, Any] | None = None


class _Run:
    """One job while its child trains it."""

    def __init__(self, jobs: JobQueue, store: Store, place: Place, claim: Claim, folder: Path) -> None:
        self._jobs = jobs
        self._store = store
        self._claim = claim
        self._folder = folder
        self._renewed = self._kept = time.monotonic()
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._news = _News()
        self._child = subprocess.Popen(
            [sys.executable, "-m", _CHILD, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a traceback quotes what it was about: somebody's data
            start_new_session=True,
            env=_environment(place.threads),
        )

    def go(self, stop: threading.Event) -> None:
        """Returns once the job is handed in, put back, failed or lost."""
        listener = threading.Thread(target=self._listen, daemon=True)
        listener.start()
        try:
            while self._news.last is None:
                if not self._goes_on(stop):
                    return
            self._renew()
            self._end(self._news.last)
        finally:
            self._child.kill()
            self._child.wait()
            listener.join()
            for pipe in (self._child.stdin, self._child.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()

    def _listen(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            with suppress(ValueError):  # half a line of a child that was killed
                self._messages.put(json.loads(line))
        self._messages.put(None)

    def _goes_on(self, stop: threading.Event) -> bool:
        """Pass on what was said meanwhile, and what is wished; False where the job was lost."""
        self._take(_TICK_S)
        if self._news.planned_tokens is not None:
            planned, self._news.planned_tokens = self._news.planned_tokens, None
            if not self._jobs.plan(self._claim, planned):
                return False
        is_due = time.monotonic() - self._renewed > _RENEW_S
        standing = self._renew() if self._news.events or is_due else self._jobs.standing(self._claim)
        if standing == "lost":
            return False
        if standing == "pause" or stop.is_set():
            self._ask_to_stop()
        if self._news.has_checkpoint and time.monotonic() - self._kept > _CHECKPOINT_S:
            self._keep_last_checkpoint()
        return True

    def _ask_to_stop(self) -> None:
        assert self._child.stdin is not None
        with suppress(OSError):
            self._child.stdin.write(b"stop\n")
            self._child.stdin.flush()

    def _take(self, wait_s: float) -> None:
        """What the child says within the time, up to its last word."""
        until = time.monotonic() + wait_s
        while (left := until - time.monotonic()) > 0 and self._news.last is None:
            try:
                message = self._messages.get(timeout=left)
            except queue.Empty:
                return
            self._hear({"kind": "died"} if message is None else message)

    def _hear(self, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "step":
            self._hear_step(message)
        elif kind == "message":
            text = renamed(message["message"], _NAMES)
            self._news.events.append(NewEvent(text, level="warn" if message["is_warning"] else "info"))
        elif kind == "report":
            report = {**message["report"], "file": _NAMES.get(message["report"]["file"])}
            self._news.events.append(NewEvent(f"What is in '{report['file']}'.", data={"report": report}))
        elif kind == "sample":
            sample = message["sample"]
            text = f"Step {sample['step']}: row {sample['row']} of validation_file was answered."
            self._news.events.append(NewEvent(text, data=sample, step=sample["step"], is_figures=False))
        elif kind == "plan":
            self._news.planned_tokens = message["tokens"]
        elif kind == "checkpoint":
            self._news.has_checkpoint = True
        else:
            self._news.last = message

    def _hear_step(self, message: dict[str, Any]) -> None:
        step, total, values = message["step"], message["total"], message["values"]
        self._news.step = step
        self._news.spent = Spent(message["tokens"], int(message["seconds"] * MICROSECONDS))
        self._news.remaining_s = values.get("remaining_s", self._news.remaining_s)
        every = -(-total // _MOST_METRICS)
        if step % every and step != total:
            return
        data = {"step": step, "total_steps": total, "train_loss": values["loss"]}
        said = f"Step {step}/{total}: training loss={values['loss']:.4f}"
        if "eval_loss" in values:
            data["valid_loss"] = values["eval_loss"]
            said += f", validation loss={values['eval_loss']:.4f}"
        for name, called in _PREFERENCE.items():
            if name in values:
                data[called] = values[name]
        self._news.events.append(NewEvent(said, data=data, step=step))

    def _renew(self) -> str:
        news = self._news
        standing = self._jobs.renew(
            self._claim, news.events, step=news.step, remaining_s=news.remaining_s, spent=news.spent
        )
        news.events = []
        self._renewed = time.monotonic()
        return standing

    def _end(self, said: dict[str, Any]) -> None:
        kind = said["kind"]
        if kind == "done":
            self._hand_in(said)
        elif kind == "stopped":
            self._jobs.put_back(self._claim, self._keep_checkpoint(checkpoint_path(self._folder / "adapter")))
        elif kind == "failed" and said["is_final"]:
            message = renamed(said["message"], _NAMES)
            param = said.get("param")
            self._jobs.fail(self._claim, Failure(said["code"], message, _NAMES.get(param or "", param)))
        else:
            reason = said.get("message") or f"exit code {self._child.wait()}"
            _log.error("The process that trained %s has failed: %s", self._claim.job.id, reason)
            self._jobs.lose(self._claim)

    def _keep_last_checkpoint(self) -> None:
        """The child replaces its checkpoint as it likes, and drops it at its end: what is kept is a link of our own."""
        link = self._folder / "kept.safetensors"
        link.unlink(missing_ok=True)
        self._news.has_checkpoint = False
        with suppress(FileNotFoundError):
            link.hardlink_to(checkpoint_path(self._folder / "adapter"))
            name = self._keep_checkpoint(link)
            if name is not None:
                self._jobs.checkpoint(self._claim, name)

    def _keep_checkpoint(self, path: Path) -> str | None:
        """The checkpoint in the store, under a name that no other run writes; None where it cannot be stored now.

        The training goes on without it: the one that was stored before is good still.
        """
        name = f"{self._claim.remains}-checkpoint.safetensors"
        try:
            with held_by_thread(self._jobs, self._claim):
                self._store.keep_file(name, path)
        except (StoreUnavailable, StorageFull) as error:
            _log.warning("A checkpoint of %s is not kept: %s", self._claim.job.id, error.message)
            return None
        finally:
            self._kept = time.monotonic()
        return name

    def _hand_in(self, said: dict[str, Any]) -> None:
        out = self._folder / "adapter"
        with held_by_thread(self._jobs, self._claim):
            for path in (*(out / name for name in (*ADAPTER_FILES, CARD_FILE)), report_folder(out) / REPORT_FILE):
                self._store.keep_file(f"{self._claim.remains}-{path.name}", path)
        figures = {name: value for name, value in said.items() if name != "kind"}
        self._jobs.hand_in(self._claim, {**figures, "remains": self._claim.remains})


def _environment(threads: int) -> dict[str, str]:
    """A child's: no setting of ours, which may hold the database's password, and no way to a hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return {**kept, **counts, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
