"""Runs a plan: sends every request when it is due, whatever the answers do.

In an open loop a request leaves at its scheduled time even if nothing has come back. With `max_in_flight` it may
have to wait, and its latency counts the waiting. In a closed loop a request is due when its client is free, so
queueing in front of the server is hidden by construction; that is what the mode means.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from manylora_loadtest.changes import read_folders, run_change
from manylora_loadtest.client import Client
from manylora_loadtest.discovery import Counters, read_counters, read_usage, resolve_adapters
from manylora_loadtest.load_meter import ClientLoad, LoadMeter
from manylora_loadtest.machine import machine
from manylora_loadtest.plan import Plan, PlannedRequest, Stage, make_plan
from manylora_loadtest.results import ChangeResult, RequestResult
from manylora_loadtest.scenario import Scenario
from manylora_loadtest.server_watch import ServerSample, ServerWatch

__all__ = ["Progress", "Run", "StageSpan", "run_scenario"]

_WARMUP_CLIENTS = 8
_COUNTERS_WITHIN_S = 5.0


@dataclass(frozen=True, slots=True)
class StageSpan:
    """When a stage ran, in seconds from the run's start; `end_s` is its last answer's."""

    index: int
    label: str
    rate: float | None
    concurrency: int | None
    start_s: float
    end_s: float


@dataclass(slots=True)
class Progress:
    """What has happened so far; read by the live view while the run goes on."""

    num_planned: int = 0
    num_sent: int = 0
    stage: str = ""
    now_s: float = 0.0
    results: list[RequestResult] = field(default_factory=list)  # ended ones, in order of their end
    changes: list[ChangeResult] = field(default_factory=list)

    @property
    def in_flight(self) -> int:
        return self.num_sent - len(self.results)


@dataclass(slots=True)
class Run:
    """A finished run. `counters`: the server's own totals over the run, `usage`: what it charges for the run.

    Either is None where the server does not have it. `server`: samples of the server itself, where it was watched.
    """

    scenario: Scenario
    url: str
    base: str
    started: datetime
    results: list[RequestResult]
    changes: list[ChangeResult]
    stages: list[StageSpan]
    client: ClientLoad
    machine: dict[str, Any] = field(default_factory=machine)
    counters: Counters | None = None
    usage: Counters | None = None
    server: list[ServerSample] = field(default_factory=list)


Reader = Callable[[Client, str | None], Awaitable[Counters | None]]
Watcher = Callable[[Progress], Awaitable[None]]


async def run_scenario(
    scenario: Scenario,
    url: str,
    *,
    key: str | None = None,
    metrics_key: str | None = None,
    watch: Watcher | None = None,
    pid: int | None = None,
) -> Run:
    """Runs `scenario` against the server at `url`.

    `key` is for tenants without one of their own, `metrics_key` for the server's `/metrics`; `watch` runs beside
    the load and is cancelled at its end. `pid` is the server's process, if its memory and files are to be watched.
    Raises LoadTestError when the run cannot start.
    """
    keys = {tenant.name: tenant.secret(key) for tenant in scenario.tenants}
    started = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - started

    async with Client(url, clock=clock, timeout_s=scenario.requests.timeout_s) as client:
        base, adapters = await resolve_adapters(client, scenario, keys)
        plan = make_plan(scenario, base, adapters)
        own_key = metrics_key or key
        before = await read_counters(client, own_key)
        # Who may not read the counters would see one tenant's usage only.
        charged_before = None if before is None else await read_usage(client, own_key)
        started = time.perf_counter()
        session = _Session(scenario, client, clock, keys, plan, ServerWatch(client, own_key, clock, pid))
        start_time = datetime.now(UTC)
        load = await session.run(watch)
        run = Run(
            scenario, client.url, base, start_time, session.progress.results, session.progress.changes,
            session.spans, load, server=session.server.samples,
        )  # fmt: skip
        await session.server.settle()
        run.counters = await _settled(read_counters, client, own_key, before, run.results)
        run.usage = await _settled(read_usage, client, own_key, charged_before, run.results)
    return run


async def _settled(
    read: Reader, client: Client, key: str | None, before: Counters | None, results: Sequence[RequestResult]
) -> Counters | None:
    """A server may count a request just after its last byte; so ask until the totals are equal, for a while."""
    if before is None:
        return None
    ok = [result for result in results if result.is_ok]
    expected = Counters(len(ok), sum(r.prompt_tokens for r in ok), sum(r.output_tokens for r in ok))
    until = time.perf_counter() + _COUNTERS_WITHIN_S
    while True:
        now = await read(client, key)
        counted = now and now.since(before)
        if counted is None or counted == expected or time.perf_counter() > until:
            return counted
        await asyncio.sleep(0.1)


class _Session:
    """The state of one run."""

    def __init__(
        self,
        scenario: Scenario,
        client: Client,
        clock: Callable[[], float],
        keys: Mapping[str, str | None],
        plan: Plan,
        server: ServerWatch,
    ) -> None:
        self._scenario = scenario
        self._client = client
        self._clock = clock
        self._keys = keys
        self._plan = plan
        self.server = server
        self.spans: list[StageSpan] = []
        self.progress = Progress(num_planned=plan.num_requests + len(plan.warmup))

    async def run(self, watch: Watcher | None) -> ClientLoad:
        files = [read_folders(change) for change in self._scenario.changes]
        meter = LoadMeter()
        async with _beside(meter.sample(), self._tick(), *([watch(self.progress)] if watch else [])):
            self.progress.stage = "warm-up"
            await self._closed(self._plan.warmup, _WARMUP_CLIENTS, None)
            meter.reset()
            async with _beside(self.server.sample()):
                await self._stages_with_changes(files)
            return meter.read()

    async def _stages_with_changes(self, files: Sequence[list[dict[str, bytes]]]) -> None:
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as changes:
            for change, folders in zip(self._scenario.changes, files, strict=True):
                key = self._keys[self._scenario.tenant(change.tenant).name]
                changes.create_task(
                    run_change(change, folders, self._client, key, self._clock, self.progress.changes, stop)
                )
            try:
                await self._stages()
            finally:
                stop.set()

    async def _tick(self) -> None:
        while True:
            self.progress.now_s = self._clock()
            await asyncio.sleep(0.1)

    async def _stages(self) -> None:
        arrival = self._scenario.arrival
        pending: set[asyncio.Task[None]] = set()
        for stage in self._plan.stages:
            self.progress.stage = stage.label
            start_s = self._clock()
            if stage.concurrency is not None:
                await self._closed(stage.requests, stage.concurrency, stage.duration_s)
            else:
                pending |= await self._open(stage, start_s, arrival.max_in_flight if arrival else None)
                if arrival is None or arrival.drain_between_stages:
                    await asyncio.gather(*pending)
            self.spans.append(
                StageSpan(stage.index, stage.label, stage.rate, stage.concurrency, start_s, self._clock())
            )
        await asyncio.gather(*pending)

    async def _open(self, stage: Stage, start_s: float, max_in_flight: int | None) -> set[asyncio.Task[None]]:
        gate = asyncio.Semaphore(max_in_flight) if max_in_flight else contextlib.nullcontext()
        tasks: set[asyncio.Task[None]] = set()
        for request in stage.requests:
            await asyncio.sleep(max(0.0, start_s + request.at_s - self._clock()))
            tasks.add(asyncio.create_task(self._gated(request, start_s + request.at_s, gate)))
        rest_s = start_s + (stage.duration_s or 0) - self._clock()
        if rest_s > 0:
            await asyncio.sleep(rest_s)
        return tasks

    async def _gated(
        self, request: PlannedRequest, due_s: float, gate: contextlib.AbstractAsyncContextManager[None]
    ) -> None:
        async with gate:
            await self._send(request, due_s)

    async def _closed(self, requests: Sequence[PlannedRequest], num_clients: int, duration_s: float | None) -> None:
        waiting = iter(requests)
        until = self._clock() + duration_s if duration_s is not None else float("inf")

        async def client() -> None:
            while self._clock() < until and (request := next(waiting, None)) is not None:
                await self._send(request, self._clock())

        await asyncio.gather(*(client() for _ in range(min(num_clients, len(requests)))))

    async def _send(self, request: PlannedRequest, due_s: float) -> None:
        result = RequestResult(
            request.index, request.stage, request.tenant, request.adapter, request.is_chat,
            request.prompt_tokens, request.output_tokens, due_s,
        )  # fmt: skip
        self.progress.num_sent += 1
        await self._client.send(request, result, self._keys[request.tenant])
        self.progress.results.append(result)


class _beside:  # noqa: N801 - reads as a statement, as contextlib's own
    """Runs coroutines beside a block and cancels them at its end; one that fails first shows its error there."""

    def __init__(self, *work: Awaitable[None]) -> None:
        self._work = work
        self._tasks: list[asyncio.Future[None]] = []

    async def __aenter__(self) -> None:
        self._tasks = [asyncio.ensure_future(work) for work in self._work]

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        for task in self._tasks:
            task.cancel()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        for result in ended:
            if isinstance(result, Exception):
                raise result
