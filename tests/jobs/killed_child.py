"""The process that `test_killed` has lives from: a server, its worker and those that train and judge, ended by SIGKILL.

A life has the server's parts over an engine without a model, behind a socket, and is over when nothing is left to do.
What takes long to import is imported once: every process of a life is a fork of this one, which runs one thread. It
reads a life's hooks as a line of JSON, and says how the life ended once all of its processes have.
"""

import asyncio
import importlib
import itertools
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

# Imported here so that no fork has to.
import peft  # noqa: F401
import torch  # noqa: F401
import uvicorn

from manylora.catalog.base_signature import signature_of
from manylora.jobs import child, judge, judge_process, publisher, queue, worker, worker_process
from manylora.jobs.queue import JobQueue
from manylora.lifecycle.base import load_tokenizer
from manylora.lifecycle.evaluate.command import run_evaluation  # noqa: F401
from manylora.lifecycle.progress import Progress
from manylora.lifecycle.train import train  # noqa: F401
from manylora.lifecycle.weights.served import Inspector
from manylora.models.codec import HuggingFaceCodec
from manylora.models.offered import modules_of
from manylora.serving.http_server import bind
from manylora.serving.parts import Foundation, open_parts
from manylora.settings import Settings
from tests.api.fakes import FakeGeneration
from tests.catalog.rig import CatalogEngine
from tests.lifecycle.helpers import label_rows

ENDED, ONE_HAS_DIED = 0, 3
PIDS: dict[str, int] = {}


def install(hooks: list[dict[str, Any]]) -> None:
    """Each hook: `at`, a module and what is in it; `when`, before or after it is called; `word`, which the call or its
    result has to hold; `kills`, the processes that end then, the one that called last.
    """
    for hook in hooks:
        module, _, path = hook["at"].partition(":")
        *owners, name = path.split(".")
        owner: Any = importlib.import_module(module)
        for each in owners:
            owner = getattr(owner, each)
        setattr(owner, name, _hooked(getattr(owner, name), hook))


def _hooked(method: Callable[..., Any], hook: Mapping[str, Any]) -> Callable[..., Any]:
    def fire(*said: Any) -> None:
        if hook["word"] in repr(said) and _is_first(hook.get("once")):
            for pid in sorted((PIDS[name] for name in hook["kills"]), key=lambda pid: pid == os.getpid()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def call(*args: Any, **named: Any) -> Any:
        if hook["when"] == "before":
            fire(args[1:], named)
        result = method(*args, **named)
        if hook["when"] == "after":
            fire(args[1:], named, result)
        return result

    return call


def _is_first(once: str | None) -> bool:
    """Whether it was not done before, by a process that has ended of it."""
    if once is None:
        return True
    is_first = not Path(once).exists()
    Path(once).touch()
    return is_first


class Knowing(CatalogEngine):
    """Reads prompts by the base's own tokenizer; every adapter answers with the right label, and the base does not."""

    def script(self, generation: FakeGeneration) -> tuple[int, ...]:
        asked = self.codec.decode(generation.prompt_ids)
        label = next((row["label"] for row in label_rows() if row["text"] in asked), "")
        said = "?" if generation.adapter is None else label
        return tuple(self.codec.encode(said, add_special_tokens=False))[: generation.params.max_tokens]

    def text_of(self, step: int, token_id: int) -> str:
        return self.codec.decode([token_id])


class Fork:
    """A process that trains or judges, as `subprocess.Popen` has it, forked from where no other thread runs."""

    address = ""
    alive = -1

    def __init__(self, command: list[str], *, env: Mapping[str, str], **_: Any) -> None:
        their_in, our_in = os.pipe()
        our_out, their_out = os.pipe()
        with socket.socket(socket.AF_UNIX) as asking:
            asking.connect(self.address)
            told = json.dumps({"last": command[-1], "env": dict(env), "pids": PIDS}).encode() + b"\n"
            socket.send_fds(asking, [told[:1]], [their_in, their_out, self.alive])
            asking.sendall(told[1:])
            self.pid = int(asking.makefile().readline())
        os.close(their_in)
        os.close(their_out)
        self.stdin = os.fdopen(our_in, "wb", 0)
        self.stdout = os.fdopen(our_out, "rb")

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        with suppress(ProcessLookupError):
            handle = os.pidfd_open(self.pid)
            select.select([handle], [], [])
            os.close(handle)
        return 0


class JudgeFork(Fork):
    """The process that judges, as `asyncio` has it."""

    returncode: int | None = None

    @classmethod
    async def begin(cls, *command: str, env: Mapping[str, str], **_: Any) -> "JudgeFork":
        return cls(list(command), env=env)

    async def communicate(self, said: bytes) -> tuple[bytes, None]:
        answer = await asyncio.to_thread(self._answered, said)
        self.returncode = 0
        return answer, None

    def _answered(self, said: bytes) -> bytes:
        with self.stdin, self.stdout:
            self.stdin.write(said)
            return self.stdout.read()

    async def wait(self) -> int:  # type: ignore[override]
        return await asyncio.to_thread(super().wait)


def _judge() -> None:
    judge_process._NICENESS = 0  # type: ignore[misc]
    judge_process.main()


def _train(folder: str, hooks: list[dict[str, Any]]) -> None:
    if any(hook.get("waits") for hook in hooks):
        child._tell = partial(_tell_and_wait, child._tell)
    if any(hook.get("until_stopped") for hook in hooks):
        child._done = partial(_done_once_stopped, child._done)
    child._NICENESS = 0  # type: ignore[misc]  # nobody is served beside it
    sys.argv = ["child", folder]
    child.main()


def _work(told: dict[str, Any], fds: list[int], hooks: list[dict[str, Any]]) -> NoReturn:
    os.dup2(fds[0], 0)
    os.dup2(fds[1], 1)
    for fd in fds[:2]:
        os.close(fd)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    os.environ.update(told["env"])
    name = "judge" if told["last"] == judge._MODULE else "trainer"
    PIDS.update(told["pids"], **{name: os.getpid()})
    install([hook for hook in hooks if hook["in"] == name])
    try:
        _judge() if name == "judge" else _train(told["last"], hooks)
    finally:
        os._exit(0)


def _tell_and_wait(tell: Callable[..., None], messages: Any, **message: Any) -> None:
    """It tells of a checkpoint, and goes no further, however long whoever listens takes to hear of it."""
    tell(messages, **message)
    if message["kind"] == "checkpoint":
        threading.Event().wait()


def _done_once_stopped(
    done: Callable[..., dict[str, Any]],
    folder: Path,
    listen: Callable[[Progress], None],
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Two steps are made, and no further one before it is asked to stop."""
    steps = itertools.count()

    def waits() -> bool:
        while next(steps) >= 2 and not should_stop():
            time.sleep(0.05)
        return should_stop()

    return done(folder, listen, waits)


def _live(settings: Settings, hooks: list[dict[str, Any]]) -> NoReturn:
    """The server; before it has threads, its worker is made beside it, which ends when its standard input does."""
    os.dup2(2, 1)  # what is logged is no answer
    worker._IDLE_S = worker._TICK_S = publisher._LOOK_EVERY_S = judge._LOOK_EVERY_S = 0.1  # type: ignore[misc]
    queue._TRY_AGAIN_US = 0  # type: ignore[misc]
    worker._CHECKPOINT_S = 0.0  # type: ignore[misc]
    vars(asyncio)["create_subprocess_exec"] = JudgeFork.begin
    vars(worker)["subprocess"] = SimpleNamespace(Popen=Fork, PIPE=-1, DEVNULL=-3)
    install([hook for hook in hooks if hook["in"] == "life"])
    PIDS["server"] = os.getpid()
    modules = modules_of(settings.model)
    theirs, ours = os.pipe()
    PIDS["worker"] = os.fork()
    if PIDS["worker"] == 0:
        PIDS["worker"] = os.getpid()
        os.close(ours)
        os.dup2(theirs, 0)
        sys.stdin = os.fdopen(0)
        worker_process.main()
        os._exit(0)
    os.close(theirs)
    assignment = worker_process.Assignment.of(settings, seats=1, base=signature_of(modules).value)
    os.write(ours, assignment.as_line())
    inspector = Inspector(settings.data_dir, modules)
    engine = Knowing(codec=HuggingFaceCodec(load_tokenizer(settings.model)[0], ()))  # type: ignore[arg-type]
    asyncio.run(_serve(settings, Foundation(modules, inspector, lambda *_: engine)))
    os.close(ours)
    _, status = os.waitpid(PIDS["worker"], 0)
    os._exit(ONE_HAS_DIED if os.WIFSIGNALED(status) else ENDED)


async def _serve(settings: Settings, foundation: Foundation) -> None:
    """Until nothing waits to be trained, published or judged, or the worker has died."""
    has_ended = partial(os.waitid, os.P_PID, PIDS["worker"], os.WEXITED | os.WNOHANG | os.WNOWAIT)
    sock = bind("127.0.0.1", 0)
    sock.listen()
    address = f"http://127.0.0.1:{sock.getsockname()[1]}"
    async with open_parts(settings, lambda _: foundation, address=address) as parts:
        server = uvicorn.Server(uvicorn.Config(parts.app(), log_level="warning"))
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        counts = partial(JobQueue(parts.catalog.database).counts, parts.catalog.base)
        left = await parts.catalog.database.run(counts)
        while left and has_ended() is None:
            await asyncio.sleep(0.1)
            left = await parts.catalog.database.run(counts)
        server.should_exit = True
        await serving


def _lives(settings: Settings, listener: socket.socket) -> None:
    for line in sys.stdin:
        hooks = json.loads(line)
        alive, Fork.alive = os.pipe()
        life = os.fork()
        if life == 0:
            _live(settings, hooks)
        os.close(Fork.alive)
        heard: list[Any] = [listener, alive]
        while alive not in select.select(heard, [], [])[0]:
            _make_fork(listener, hooks)
        os.close(alive)
        status = os.waitstatus_to_exitcode(os.waitpid(life, 0)[1])
        with suppress(ChildProcessError):
            while os.waitpid(-1, 0):
                continue
        os.write(1, json.dumps({"status": status}).encode() + b"\n")


def _make_fork(listener: socket.socket, hooks: list[dict[str, Any]]) -> None:
    asking, _ = listener.accept()
    with asking:
        first, fds, _, _ = socket.recv_fds(asking, 1, 3)
        with asking.makefile() as rest:
            told = json.loads(first.decode() + rest.readline())
        pid = os.fork()
        if pid == 0:
            _work(told, fds, hooks)
        for fd in fds:
            os.close(fd)
        asking.sendall(f"{pid}\n".encode())


def main() -> None:
    """`SETTINGS ADDRESS`, of which the second is where a socket may be."""
    Fork.address = sys.argv[2]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(Fork.address)
        listener.listen()
        os.write(1, b'{"ready": true}\n')
        _lives(Settings(**json.loads(sys.argv[1])), listener)


if __name__ == "__main__":
    main()
