"""One admitted request on its way through the engine, with everything that must happen when it ends."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from manylora.api.record import FinishedRequest, RequestRecord
from manylora.api.requests import Prompt
from manylora.api.state import Services
from manylora.engine.interface import AdapterRef, Delta, FinishReason, Generation
from manylora.errors import Draining, ManyloraError
from manylora.tenants.interface import Lease, Principal

__all__ = ["Job", "Run"]


@dataclass(frozen=True, slots=True)
class Job:
    """A request that was checked: choice j of prompt i is number i * n + j."""

    id: str
    principal: Principal
    adapter: AdapterRef | None
    prompts: tuple[Prompt, ...]
    cache_salt: str | None = None

    @property
    def n(self) -> int:
        return self.prompts[0].params.n

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.n

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)


class Run:
    """`async with Run(...) as run: async for choice, delta in run.deltas(): ...`

    Entering charges the quota and queues the prompts; it raises QuotaExceeded, QueueFull, Draining, EngineDead.
    Leaving, for whatever reason, aborts what still runs, settles the quota and hands the finished request to
    `on_end`; an answer that is whole calls `complete` before its last bytes leave.
    """

    def __init__(
        self,
        services: Services,
        job: Job,
        record: RequestRecord,
        on_end: Callable[[FinishedRequest], Awaitable[None]],
    ) -> None:
        self.job = job
        self.record = record
        self._services = services
        self._on_end = on_end
        self._lease: Lease | None = None
        self._generations: list[Generation] = []
        self._heard: dict[int, int] = {}  # tokens that came so far, by prompt
        self._is_closed = False

    async def __aenter__(self) -> Self:
        job = self.job
        try:
            self._lease = self._services.gate.admit(
                job.principal, job.num_prompt_tokens, sum(p.params.max_tokens * p.params.n for p in job.prompts)
            )
            for number, prompt in enumerate(job.prompts):
                generation = self._services.engine.generate(
                    f"{job.id}-{number}",
                    prompt.ids,
                    prompt.params,
                    adapter=job.adapter,
                    tenant=job.principal.tenant,
                    weight=job.principal.weight,
                    cache_salt=job.cache_salt,
                )
                self._generations.append(generation)
        except BaseException as error:
            await self._close(error)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close(error)

    async def complete(self) -> None:
        """All of the answer is known: count it. Returns when its usage is stored."""
        await self._close(None)

    async def _close(self, error: BaseException | None) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        try:
            for generation in self._generations:
                await generation.aclose()
        finally:
            self._account_for_the_rest()
            if self._lease is not None:
                self._lease.settle(self.record.prompt_tokens, self.record.completion_tokens)
            await self._on_end(self.record.finish(error))

    def _account_for_the_rest(self) -> None:
        """Tokens that were generated and never fetched, since the client left or the request failed."""
        record = self.record
        record.progress = tuple(generation.progress for generation in self._generations)
        for prompt, progress in enumerate(record.progress):
            if progress.num_output_tokens and prompt not in self._heard:
                record.prompt_tokens += len(self.job.prompts[prompt].ids)
            record.completion_tokens += progress.num_output_tokens - self._heard.get(prompt, 0)

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """Every delta with the number of its choice. Raises what the engine raises."""
        only = self._generations[0] if len(self._generations) == 1 else None
        source = _numbered(only) if only is not None else _merged(self._generations)
        try:
            async for prompt, delta in source:
                choice = prompt * self.job.n + delta.index
                self._account(prompt, choice, delta)
                yield choice, delta
        finally:
            await source.aclose()

    def _account(self, prompt: int, choice: int, delta: Delta) -> None:
        record, now = self.record, time.perf_counter()
        if prompt not in self._heard:
            self._heard[prompt] = 0
            record.prompt_tokens += len(self.job.prompts[prompt].ids)
            record.timings.append(self._generations[prompt].timing)
        record.cached_tokens += delta.num_cached_tokens
        num_tokens = len(delta.token_ids)
        self._heard[prompt] += num_tokens
        record.add_tokens(choice, num_tokens, now)
        self._services.traffic.tick(record, num_tokens, now)
        if delta.finish_reason is FinishReason.ABORTED:
            raise Draining("The server stopped before this answer was finished. Send the request again.")
        if delta.finish_reason is FinishReason.ERROR:
            raise ManyloraError("The engine failed on this request.")


async def _numbered(generation: Generation) -> AsyncGenerator[tuple[int, Delta], None]:
    async for delta in generation:
        yield 0, delta


async def _merged(generations: list[Generation]) -> AsyncGenerator[tuple[int, Delta], None]:
    """The deltas of several generations as they come."""
    queue: asyncio.Queue[tuple[int, Delta | None]] = asyncio.Queue()

    async def pump(number: int) -> None:
        try:
            async for delta in generations[number]:
                queue.put_nowait((number, delta))
        finally:
            queue.put_nowait((number, None))

    pumps = [asyncio.create_task(pump(number)) for number in range(len(generations))]
    try:
        num_left = len(pumps)
        while num_left:
            number, delta = await queue.get()
            if delta is None:
                await pumps[number]
                num_left -= 1
            else:
                yield number, delta
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
