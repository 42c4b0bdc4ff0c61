"""One request for text from its arrival to its end, whichever route it came by and whatever its answer looks like."""

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Protocol, TypeAlias

from starlette.requests import Request
from starlette.responses import Response

from manylora.api.defaults import check_template_allowed, with_defaults
from manylora.api.fields import renamed
from manylora.api.inputs import InputsRequest
from manylora.api.kinds import check_kind, check_writes
from manylora.api.naming import Named, asker, looked_up, missing, named_by
from manylora.api.record import Counts, RequestRecord
from manylora.api.requests import Prompt, check_connected, prompts_of, read_body
from manylora.api.schemas import InferenceRequest
from manylora.api.sse import Event, EventStream, while_connected
from manylora.api.state import Services
from manylora.api.traffic import TrafficKey
from manylora.engine.interface import (
    AdapterRef,
    Delta,
    FinishReason,
    Generation,
    Mix,
    Progress,
    TextCodec,
    TokenLogprob,
)
from manylora.errors import AdapterNotFound, Draining, InvalidRequest, ManyloraError
from manylora.tenants.interface import Lease, Principal
from manylora.tenants.presence import Visit

__all__ = ["ADAPTER_HEADER", "Asked", "Deltas", "Renderer", "Run", "WholeRenderer", "answered"]

ADAPTER_HEADER: Final = "x-manylora-adapter"

Deltas: TypeAlias = AsyncGenerator[tuple[int, Delta], None]
"""What each choice was given, step by step, with the choice's number."""


class Renderer(Protocol):
    """Puts what the choices were given into the words of one API. It keeps what it needs of each, and asks nobody."""

    def arranged(self, deltas: Deltas) -> Deltas:
        """The deltas in the order, and with the content, in which they are to be rendered."""
        ...

    async def keep(self, choice: int, logprobs: Sequence[TokenLogprob]) -> None:
        """Take in the log-probabilities of the delta that comes next. Of many, others are let run meanwhile."""
        ...

    def add(self, choice: int, delta: Delta) -> None:
        """Take in a delta of an answer that is sent whole."""
        ...

    def whole(self) -> bytes:
        """The body, once every choice has finished."""
        ...

    def events(self, choice: int, delta: Delta) -> Sequence[Event]:
        """The events that a stream sends for a delta, often one, perhaps none."""
        ...

    def last_events(self) -> Sequence[Event]:
        """The events that a stream ends with."""
        ...

    def failed(self, error: ManyloraError) -> Sequence[Event]:
        """The events that a stream ends with, in place of all to come, where an error comes after the first."""
        ...


class WholeRenderer(ABC):
    """A renderer of what is never streamed and has no log-probabilities: vectors, scores. Implements `Renderer`."""

    def arranged(self, deltas: Deltas) -> Deltas:
        return deltas

    async def keep(self, choice: int, logprobs: Sequence[TokenLogprob]) -> None:
        assert not logprobs, "a body cannot ask for any"

    @abstractmethod
    def add(self, choice: int, delta: Delta) -> None:
        """Take in what an input came to."""

    @abstractmethod
    def whole(self) -> bytes:
        """The body, once every input is there."""

    def events(self, choice: int, delta: Delta) -> Sequence[Event]:
        """None: a body cannot ask for a stream."""
        return ()

    def last_events(self) -> Sequence[Event]:
        return ()

    def failed(self, error: ManyloraError) -> Sequence[Event]:
        return ()


@dataclass(frozen=True, slots=True)
class Asked:
    """What a body of any API asks for: in the terms of this server's own requests, and in which words to answer.

    `names` says what fields of `body` are called in the API that the body came by, for errors about them; `stream`, how
    a stream of that API is framed; `otherwise`, that API's own defaults: the fields of `body` that hold where neither
    the request nor the adapter says anything.
    """

    body: InferenceRequest
    renderer: "Callable[[Run], Renderer]"
    names: Mapping[str, str] = field(default_factory=dict)
    stream: type[EventStream] = EventStream
    otherwise: Mapping[str, Any] = field(default_factory=dict)

    def completed(self, body: InferenceRequest) -> InferenceRequest:
        """The body, with the adapter's defaults in it, with those of the API."""
        unsaid = {name: value for name, value in self.otherwise.items() if name not in body.model_fields_set}
        return body.model_copy(update=unsaid) if unsaid else body


async def answered(
    request: Request, principal: Principal, services: Services, read: Callable[[bytes], Asked]
) -> Response:
    """From the body to the response, for every route that answers with text.

    `read` makes of the bytes what is asked for, beside the event loop where they are many, and raises InvalidRequest.
    """
    run = Run(request, principal, services)
    async with run.ends_on_error():
        asked = await read_body(request, read)
        body = asked.body
        check_kind(body, services.engine.model)
        run.log.update(body.annotations())
        aliases = services.settings.resolved_model_aliases
        base = services.engine.model.name
        who = asker(body, principal)
        find = partial(named_by, body, services.directory, principal.tenant, base, aliases, who=who)
        try:
            run.named = await looked_up(find, services.following)
            check_writes(body, run.mix)
            check_template_allowed(body, is_allowed=services.settings.allow_request_chat_template)
            body, max_tokens = with_defaults(body, services.directory, run.named)
            _hold_images(body, services, request.scope["manylora.visit"])
            prompts = await prompts_of(
                asked.completed(body),
                services.engine,
                principal.tenant,
                max_tokens=max_tokens,
                mix=run.mix,
            )
        except InvalidRequest as error:
            raise renamed(error, asked.names) from None
        await check_connected(request)
        run.ask(prompts, gone=missing(body), cache_salt=body.cache_salt, priority=body.priority)
        return await run.answer(asked.renderer(run), is_streamed=body.is_streamed, stream=asked.stream)


def _hold_images(body: InferenceRequest, services: Services, visit: Visit) -> None:
    """Count what images will take once they are decoded, before the first is. Raises TooLarge and others."""
    vision = services.engine.model.vision
    if vision is not None and isinstance(body, InputsRequest):
        services.presence.hold(visit, len(body.urls) * vision.num_bytes)


class Run:
    """One request for text. It counts what is used, and says so to everybody when it has ended, however that comes.

        run = Run(request, caller, services)
        async with run.ends_on_error():
            run.named = …
            run.ask(prompts)
            return await run.answer(renderer, is_streamed=…)

    Answering charges the quota and queues the prompts; it raises QuotaExceeded, QueueFull, Draining, EngineDead.
    The end, for whatever reason, aborts what still runs, settles the quota and freezes the request's record, which the
    log line, the metrics, the recorders and the ledger get. The last bytes of an answer leave when its usage is stored.
    """

    def __init__(self, request: Request, principal: Principal, services: Services) -> None:
        self.id = ""  # once it is known what is asked for
        self.named = Named()
        self.prompts: tuple[Prompt, ...] = ()
        self.counts = Counts()
        self.services = services
        self.log: dict[str, Any] = request.scope["manylora.log"]
        self._request = request
        self._principal = principal
        self._cache_salt: str | None = None
        self._priority = 0
        self._gone: AdapterNotFound | None = None
        self._traffic_key: TrafficKey = principal.tenant, None
        self._lease: Lease | None = None
        self._generations: list[Generation] = []
        self._heard: dict[int, int] = {}  # tokens that came so far, by prompt
        self._is_ended = False
        services.traffic.begin(principal.tenant)

    @property
    def adapter(self) -> AdapterRef | None:
        """What the request is shown and counted as."""
        return self.named.counted_as(self._principal.tenant)

    @property
    def mix(self) -> Mix:
        """What runs."""
        return self.named.mix

    @property
    def codec(self) -> TextCodec:
        """The tokenizer of what runs."""
        return self.services.engine.codec.with_vocabulary(self.mix.vocabulary)

    @property
    def _runs_with(self) -> AdapterRef | Mix | None:
        """What the engine is asked for: a mix that is one adapter as it is, is that adapter."""
        if not self.mix.is_plain:
            return self.mix
        return self.mix.refs[0] if self.mix.parts else None

    @property
    def label(self) -> str:
        """What an answer calls its model where the request does not say."""
        return self.mix.name if self.mix.parts else self.services.engine.model.name

    @property
    def n(self) -> int:
        """Choices of each prompt; choice j of prompt i is number i * n + j."""
        return self.prompts[0].params.n

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.n

    # the beginning

    @asynccontextmanager
    async def ends_on_error(self) -> AsyncIterator[None]:
        """Whatever is raised inside is how the request ended."""
        try:
            yield
        except BaseException as error:
            await self._end(error)
            raise

    def ask(
        self,
        prompts: tuple[Prompt, ...],
        *,
        gone: AdapterNotFound | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
    ) -> None:
        """What the engine will be asked for. `gone` is raised where the adapter has been deleted by then."""
        self.id = self.log["job_id"] = uuid.uuid4().hex
        self.prompts = prompts
        self._gone = gone
        self._cache_salt = cache_salt
        self._priority = priority
        adapter = self.adapter
        self._traffic_key = self._principal.tenant, adapter.id if adapter else None
        if not self.mix.is_plain:
            self.log["adapters"] = self.mix.label
        if self.services.settings.log_prompts:
            decode = self.codec.decode
            self.log["prompts"] = [decode(prompt.ids, skip_special_tokens=False) for prompt in prompts]

    # the answer

    async def answer(
        self,
        renderer: Renderer,
        *,
        is_streamed: bool,
        stream: type[EventStream] = EventStream,
        media_type: str = "application/json",
    ) -> Response:
        """The response, which a stream begins once it is sent. Raises ClientGone where nobody waits for it any more."""
        headers = {ADAPTER_HEADER: self.named.label}
        if is_streamed:
            keep_alive_s = self.services.settings.stream_keep_alive_s
            return stream(self._events(renderer), headers=headers, keep_alive_s=keep_alive_s, failed=renderer.failed)
        content = await while_connected(self._request.receive, self._whole(renderer))
        return Response(content, headers=headers, media_type=media_type)

    async def _whole(self, renderer: Renderer) -> bytes:
        with self._missing_once_gone():
            async with self.ends_on_error():
                await self._start()
                async with aclosing(renderer.arranged(self._deltas())) as deltas:
                    async for choice, delta in deltas:
                        if delta.logprobs:
                            await renderer.keep(choice, delta.logprobs)
                        renderer.add(choice, delta)
                await self._end(None)
                return renderer.whole()

    async def _events(self, renderer: Renderer) -> AsyncGenerator[Sequence[Event], None]:
        """What is sent together, time after time."""
        with self._missing_once_gone():
            async with self.ends_on_error():
                await self._start()
                async with aclosing(renderer.arranged(self._deltas())) as deltas:
                    async for choice, delta in deltas:
                        if delta.logprobs:
                            await renderer.keep(choice, delta.logprobs)
                        events = renderer.events(choice, delta)
                        if events:
                            yield events
                await self._end(None)
                yield renderer.last_events()

    @contextmanager
    def _missing_once_gone(self) -> Iterator[None]:
        try:
            yield
        except AdapterNotFound as error:
            raise (self._gone or error) from None

    async def _start(self) -> None:
        """Charge the quota and queue the prompts."""
        most = sum(prompt.params.max_tokens * prompt.params.n for prompt in self.prompts)
        num_prompt_tokens = sum(prompt.num_tokens for prompt in self.prompts)
        self._lease = await self.services.gate.admit(self._principal, num_prompt_tokens, most)
        for number, prompt in enumerate(self.prompts):
            generation = self.services.engine.generate(
                f"{self.id}-{number}",
                prompt.ids,
                prompt.params,
                adapter=self._runs_with,
                tenant=self._principal.tenant,
                weight=self._principal.weight,
                cache_salt=self._cache_salt,
                priority=self._priority,
                sound=prompt.sound,
                picture=prompt.picture,
            )
            self._generations.append(generation)

    async def _deltas(self) -> Deltas:
        """Every delta, counted. Raises what the engine raises."""
        if len(self._generations) == 1:
            async for delta in self._generations[0]:
                self._count(0, delta.index, delta)
                yield delta.index, delta
            return
        async with aclosing(_merged(self._generations)) as merged:
            async for number, delta in merged:
                choice = number * self.n + delta.index
                self._count(number, choice, delta)
                yield choice, delta

    def _count(self, prompt: int, choice: int, delta: Delta) -> None:
        counts, now, num_tokens = self.counts, time.perf_counter(), len(delta.token_ids)
        if prompt not in self._heard:
            self._heard[prompt] = 0
            self._count_prompt(self.prompts[prompt])
            counts.timings.append(self._generations[prompt].timing)
        counts.cached_tokens += delta.num_cached_tokens
        counts.drafted_tokens += delta.num_drafted
        counts.accepted_tokens += delta.num_accepted
        self._heard[prompt] += num_tokens
        counts.add_tokens(choice, num_tokens, now)
        self.services.traffic.tick(self._traffic_key, num_tokens, now)
        if delta.finish_reason is FinishReason.ABORTED:
            raise Draining("The server stopped before this answer was finished. Send the request again.")
        if delta.finish_reason is FinishReason.ERROR:
            raise ManyloraError("The engine failed on this request.")

    def _count_prompt(self, prompt: Prompt) -> None:
        self.counts.prompt_tokens += prompt.num_tokens
        self.counts.sound_s += prompt.sound_s

    # the end

    async def _end(self, error: BaseException | None) -> None:
        """Only the first time counts. Returns when the usage of an answer that somebody waits for is stored."""
        if self._is_ended:
            return
        self._is_ended = True
        try:
            for generation in self._generations:
                await generation.aclose()
        finally:
            progress = self._count_the_rest()
            if self._lease is not None:
                self._lease.settle(self.counts.prompt_tokens, self.counts.completion_tokens)
            await self._tell(
                self.counts.frozen(
                    error,
                    request_id=self._request.scope["manylora.request_id"],
                    tenant=self._principal.tenant,
                    adapter=self.adapter,
                    canary=self.named.canary,
                    progress=progress,
                )
            )

    def _count_the_rest(self) -> tuple[Progress, ...]:
        """Tokens that were generated and never fetched, since the client left or the request failed."""
        reached = tuple(generation.progress for generation in self._generations)
        for prompt, progress in enumerate(reached):
            if progress.num_output_tokens and prompt not in self._heard:
                self._count_prompt(self.prompts[prompt])
            self.counts.completion_tokens += progress.num_output_tokens - self._heard.get(prompt, 0)
        return reached

    async def _tell(self, record: RequestRecord) -> None:
        services = self.services
        self.log.update(record.log_fields())
        services.traffic.end(record)
        services.metrics.observe_request(record)
        for recorder in services.recorders:
            recorder(record)
        if services.usage is not None:
            services.usage.add(record)
            if record.outcome != "cancelled":
                await services.usage.stored()


async def _merged(generations: list[Generation]) -> Deltas:
    """The deltas of several generations as they come, with the number of each one's."""
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
