"""One replica: a whole server without a socket, that answers questions and says which adapters it has in memory."""

import asyncio
import gc
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from contextvars import ContextVar, copy_context
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI

from manylora.api.record import RequestRecord
from manylora.api.state import Departure
from manylora.catalog.files import FolderLock
from manylora.cluster.exchange import Exchange, Fetch, Frame, Head, Question
from manylora.errors import InvalidSettings, StartupError
from manylora.identity import AdapterRef, Tier
from manylora.log import configure_logging
from manylora.serving.parts import Foundation, Parts, open_parts
from manylora.serving.process import return_freed_memory
from manylora.serving.warm_up import to_warm_up, warm_up
from manylora.settings import Settings

__all__ = ["REPLICA_HEADER", "Replica", "check_shared", "place_in"]

_MAX_KEYS: Final = 4096  # of adapters that were asked for
_MAX_TOLD: Final = 1000  # of them, how many routers are told of
_MAX_PLACES: Final = 1024
REPLICA_HEADER: Final = b"x-manylora-replica"
_key: ContextVar[str] = ContextVar("_key", default="")


def check_shared(settings: Settings) -> None:
    """Raises InvalidSettings where replicas with these settings would each have a state of their own."""
    if not settings.resolved_database_url.startswith("postgresql"):
        raise InvalidSettings(
            "The replicas of a cluster share a PostgreSQL database. Set database_url, such as "
            "postgresql://user:password@host/manylora; docs/cluster.md says how to start one."
        )


def place_in(settings: Settings) -> tuple[Settings, FolderLock]:
    """The settings of one of several replicas on this machine: in the first folder below `data_dir` that no other has.

    A replica that starts again so finds what one before it has left: files of adapters, usage that is not in the
    database yet. Raises StartupError.
    """
    check_shared(settings)
    base = settings.data_dir
    for number in range(_MAX_PLACES):
        folder = base / "replicas" / str(number)
        try:
            lock = FolderLock(folder)
        except StartupError as error:
            if not isinstance(error.__cause__, BlockingIOError):
                raise
            continue
        return settings.model_copy(update={"data_dir": folder / "data", "store_url": _store_of(settings, base)}), lock
    raise StartupError(f"{_MAX_PLACES} replicas use {base} already. Give this one another --data-dir.")


def _store_of(settings: Settings, base: Path) -> str:
    """The store of all replicas, which may lie in a folder where they are on one machine."""
    return settings.store_url or f"file://{base.absolute() / 'store'}"


class Replica:
    """Used on the event loop that it was started on. `fetch` gives a piece of a body for what stands for it.

    `is_private`: nobody but its machine reaches the ingresses, so that it may answer while there is no key. It cannot
    know by itself: the settings' `host` is where a server listens, and here something else does.
    """

    def __init__(
        self,
        settings: Settings,
        fetch: Fetch,
        load: Callable[[Settings], Foundation] | None = None,
        *,
        is_private: bool = False,
    ) -> None:
        self._settings = settings
        self._fetch = fetch
        self._load = load
        self._may_run_open = settings.allow_open or is_private
        self._stack = AsyncExitStack()
        self._running: set[asyncio.Task[None]] = set()
        self._asked: OrderedDict[str, AdapterRef] = OrderedDict()
        self._departure = Departure()
        self._parts: Parts | None = None

    async def start(self) -> None:
        """Load everything, in the order in which it can fail. Raises StartupError."""
        settings, lock = place_in(self._settings)
        self._stack.callback(lock.release)
        try:
            configure_logging(level=settings.log_level, as_json=settings.log_json)
            parts = await self._stack.enter_async_context(open_parts(settings, self._load))
            await warm_up(parts.engine, to_warm_up(parts.directory))
            self._parts = parts
            self._name = (REPLICA_HEADER, parts.catalog.replicas.id.encode())
            self._app: FastAPI = parts.app(
                may_run_open=self._may_run_open,
                departure=self._departure,
                recorders=(self._note,),
            )
        except BaseException:
            await self._stack.aclose()
            raise
        gc.collect()
        gc.freeze()
        return_freed_memory()

    async def answer(self, question: Question) -> AsyncGenerator[Frame, None]:
        """The answer, as it comes. Closing it early is to the application as a client that leaves."""
        exchange = Exchange(question, self._fetch)
        context = copy_context()
        context.run(_key.set, question.key)
        task = asyncio.get_running_loop().create_task(self._run(question, exchange), context=context)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            async for frame in exchange.frames():
                yield replace(frame, headers=(*frame.headers, self._name)) if isinstance(frame, Head) else frame
        finally:
            exchange.leave()

    async def _run(self, question: Question, exchange: Exchange) -> None:
        try:
            await self._app(question.scope, exchange.receive, exchange.send)
        finally:
            exchange.end()

    def _note(self, record: RequestRecord) -> None:
        """An adapter was asked for by a name of routers."""
        key = _key.get()
        if key and record.adapter is not None:
            self._asked[key] = record.adapter
            self._asked.move_to_end(key)
            if len(self._asked) > _MAX_KEYS:
                self._asked.popitem(last=False)

    def residency(self) -> dict[str, Any]:
        """What routers are told: `seats`, and `tiers` of the adapters that were asked for last, by their names."""
        tiers: dict[str, Tier] = {}
        for key, ref in reversed(self._asked.items()):
            tier = self._running_parts.engine.tier_of(ref)
            if tier != "disk":
                tiers[key] = tier
            if len(tiers) == _MAX_TOLD:
                break
        return {"seats": self._settings.max_num_seqs, "tiers": tiers}

    def check(self) -> None:
        """Raises EngineDead once no request can be answered any more."""
        if (failure := self._running_parts.engine.failure) is not None:
            raise failure

    @property
    def _running_parts(self) -> Parts:
        assert self._parts is not None
        return self._parts

    async def close(self) -> None:
        """Finish what runs, within the time that the settings give, and end every part."""
        self._departure.is_near = True
        if self._parts is None:  # it never came so far
            return
        await self._parts.engine.drain(self._settings.drain_timeout_s)
        if self._running:
            await asyncio.wait(self._running, timeout=1.0)
        await self._stack.aclose()
