"""The bridge between asyncio and the engine: one thread steps, the event loop asks and listens.

The only module of the engine that knows threads and asyncio. What the loop wants goes through an inbox that
the thread empties between steps; what a step produced comes back in one call to the loop.
"""

import asyncio
import math
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as SequenceOf
from functools import partial

from manylora.engine.admission import Admission
from manylora.engine.effect import effect_of, probe_prompt, probed, probes_of, vector_effect_of
from manylora.engine.engine import Engine, Output
from manylora.engine.interface import (
    PUBLIC_TENANT,
    AdapterRef,
    CompiledGrammar,
    Delta,
    Effect,
    EngineStats,
    Grammar,
    Mix,
    ModelInfo,
    Progress,
    RequestTiming,
    Residency,
    SamplingParams,
    Sound,
    Task,
    TextCodec,
    Tier,
)
from manylora.engine.recovery import Unrecoverable
from manylora.engine.sequence import Sequence, SequenceStatus
from manylora.errors import (
    AdapterLoadFailed,
    AdapterNotFinite,
    ContextLengthExceeded,
    Draining,
    EngineDead,
    InvalidRequest,
    ManyloraError,
)
from manylora.grammars.compiler import GrammarCompiler
from manylora.identity import TIERS
from manylora.images.picture import Picture
from manylora.log import get_logger
from manylora.lora.format.spec import Adapter
from manylora.lora.memory.tiers import AdapterTiers
from manylora.threads import on_event_loop

_IDLE_WAIT_S = 0.5


class RunningGeneration:
    """One request as its caller sees it; see `interface.Generation`."""

    def __init__(self, engine: "AsyncEngine", seqs: list[Sequence], load_tier: Tier) -> None:
        self._engine = engine
        self.seqs = seqs
        self._load_tier = load_tier
        self._queue: asyncio.Queue[Output | ManyloraError] = asyncio.Queue()
        self._num_open = len(seqs)

    def put(self, item: Output | ManyloraError) -> None:
        self._queue.put_nowait(item)

    @property
    def is_unheard(self) -> bool:
        """Whether nothing that becomes of its sequences is passed on any more."""
        return all(seq.listener is None for seq in self.seqs)

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self._deltas()

    async def _deltas(self) -> AsyncIterator[Delta]:
        try:
            while self._num_open:
                item = await self._queue.get()
                if isinstance(item, ManyloraError):
                    raise item
                if item.error is not None:
                    raise item.error
                if item.delta.finish_reason is not None:
                    self._num_open -= 1
                yield item.delta
        finally:
            await self.aclose()

    async def output(self) -> Output:
        """The next whole output, for the engine's own requests."""
        item = await self._queue.get()
        if isinstance(item, ManyloraError):
            raise item
        if item.error is not None:
            raise item.error
        return item

    async def aclose(self) -> None:
        self._num_open = 0
        self._engine.leave(self)

    @property
    def timing(self) -> RequestTiming:
        first = self.seqs[0]
        now = time.monotonic()
        scheduled = first.first_scheduled_s or now
        load = 0.0
        if first.load_started_s is not None:
            load = (first.load_ended_s or now) - first.load_started_s
        return RequestTiming(
            queue_ms=max(0.0, scheduled - first.arrived_s - load) * 1e3,
            load_ms=load * 1e3,
            load_tier=self._load_tier,
            ttft_ms=((first.first_token_s or now) - first.arrived_s) * 1e3,
        )

    @property
    def progress(self) -> Progress:
        first = self.seqs[0]
        ended = [seq.finished_s for seq in self.seqs if seq.finished_s is not None]
        return Progress(
            num_output_tokens=sum(seq.num_output_tokens for seq in self.seqs),
            arrived_s=first.arrived_s,
            load_started_s=first.load_started_s,
            load_ended_s=first.load_ended_s,
            scheduled_s=first.first_scheduled_s,
            first_token_s=first.first_token_s,
            finished_s=max(ended) if len(ended) == len(self.seqs) else None,
        )


class AsyncEngine:
    """Implements `interface.EngineClient`. Call `start` on the event loop before anything else."""

    def __init__(
        self,
        engine: Engine,
        tiers: AdapterTiers,
        model: ModelInfo,
        codec: TextCodec,
        grammars: GrammarCompiler,
        *,
        max_open: int,
        tenant_share: float = 0.5,
        before_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self.codec = codec
        self._engine = engine
        self._tiers = tiers
        self._grammars = grammars
        self._admission = Admission(max_open, engine.scheduler.max_num_seqs, tenant_share)
        self.max_choices = self._admission.most
        self._before_step = before_step
        self._inbox: deque[tuple[list[Sequence], Callable[[], None]]] = deque()  # with whom each is about
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._open: set[RunningGeneration] = set()  # those with sequences that somebody listens to; event loop only
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: str | None = None
        self._on_death: Callable[[], None] = lambda: None
        self._is_stopping = False
        self.is_draining = False
        self._num_probes = 0
        self.own_sound: Sound | None = None  # what a model of speech hears where nobody sent any
        self.own_picture: Picture | None = None  # and what one of images sees
        tiers.on_change = self._wake.set  # it may let the engine go on

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        return self._thread.is_alive() and self._failure is None and not self._is_stopping

    @property
    def failure(self) -> EngineDead | None:
        """Why the engine has ended, once it has failed for good."""
        return None if self._failure is None else EngineDead(f"The engine has stopped: {self._failure}")

    def on_death(self, action: Callable[[], None]) -> None:
        """Call `action` on the event loop when the engine has failed for good and everybody was told."""
        self._on_death = action

    # requests

    async def compile(self, grammar: Grammar, tenant: str) -> CompiledGrammar:
        """Make a grammar ready; see `interface.EngineClient`."""
        self._check_open()
        return await asyncio.wrap_future(self._grammars.compile(grammar, tenant))

    def generate(
        self,
        request_id: str,
        prompt_ids: SequenceOf[int],
        params: SamplingParams,
        *,
        adapter: AdapterRef | Mix | None = None,
        tenant: str = "public",
        weight: float = 1.0,
        cache_salt: str | None = None,
        priority: int = 0,
        sound: Sound | None = None,
        picture: Picture | None = None,
    ) -> RunningGeneration:
        """Queue a request; see `interface.EngineClient`."""
        self._check_open()
        self._admission.check(tenant, params.n)
        mix = adapter if isinstance(adapter, Mix) else Mix.of(adapter)
        mix.check(self._tiers.book.num_slots)
        num_virtual = mix.num_virtual_tokens
        if num_virtual + len(prompt_ids) > self.model.most_prompt_tokens:
            virtual = f" behind {num_virtual} virtual ones of its adapter" if num_virtual else ""
            raise ContextLengthExceeded(
                f"The prompt has {len(prompt_ids)} tokens{virtual} and the model's context is "
                f"{self.model.context_length}."
            )
        if not prompt_ids:
            raise InvalidRequest("The prompt is empty. Send at least one token.", param="prompt")
        vocab_size = mix.vocab_size(self.model.vocab_size)
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < vocab_size:
            raise InvalidRequest(
                f"The prompt holds a token id that is not in 0 to {vocab_size - 1}, so the model has no "
                "embedding for it.",
                param="prompt",
            )
        acts_from = mix.acts_from(prompt_ids)
        own = mix.vocabulary
        decode = self.codec.with_vocabulary(own).decode if own is not None and own.tokens else None
        seqs = [
            Sequence(
                request_id,
                list(prompt_ids),
                params,
                index=i,
                adapter=mix,
                tenant=tenant,
                weight=weight,
                cache_salt=cache_salt,
                priority=priority,
                acts_from=acts_from,
                decode=decode,
            )
            for i in range(params.n)
        ]
        for seq in seqs:
            seq.seed, seq.sound, seq.picture = seqs[0].seed, sound or self.own_sound, picture or self.own_picture
        seqs[0].followers = seqs[1:]
        return self._submit(seqs)

    def _submit(self, seqs: list[Sequence]) -> RunningGeneration:
        assert on_event_loop()
        tier: Tier = "device"
        for ref in seqs[0].mix.refs:
            tier = max(tier, self._tiers.tier_of(ref), key=TIERS.index)
            self._tiers.prefetch(ref, seqs[0].tenant)
        generation = RunningGeneration(self, seqs, tier)
        self._open.add(generation)
        for seq in seqs:
            seq.listener = generation
            self._admission.enter(seq.tenant)
        self._post(seqs, lambda: self._engine.add(seqs[0]))
        return generation

    def leave(self, generation: RunningGeneration) -> None:
        """Nobody listens to this request any more: take out what still runs of it."""
        mine = [seq for seq in generation.seqs if seq.listener is not None]
        if mine:
            self._close(mine)
            self._post(mine, lambda: self._engine.abort(mine))

    def _close(self, seqs: list[Sequence]) -> None:
        """Nobody listens to these sequences of one request any more: they have ended, or are about to."""
        assert on_event_loop()
        for seq in seqs:
            generation, seq.listener = seq.listener, None
            self._admission.leave(seq.tenant)
            if isinstance(generation, RunningGeneration) and generation.is_unheard:
                self._open.discard(generation)

    def _check_open(self) -> None:
        if self.failure is not None:
            raise self.failure
        if self.is_draining:
            raise Draining("The server is shutting down.")

    def _post(self, seqs: list[Sequence], action: Callable[[], None]) -> None:
        self._inbox.append((seqs, action))
        self._wake.set()

    # adapters

    async def measure_effect(
        self, ref: AdapterRef, adapter: Adapter, *, tenant: str = PUBLIC_TENANT, weight: float = 1.0
    ) -> Effect:
        """Logits of a fixed prompt with the adapter against those without; see `interface.EngineClient`."""
        self._check_open()
        prompt = probe_prompt(self.codec, self.model, ref, adapter, self.own_picture)
        self._num_probes += 1
        self._tiers.offer(ref, adapter)
        asked = [
            self._probe(f"probe-{self._num_probes}-{number}", *each, picture, tenant, weight)
            for number, (each, picture) in enumerate(
                zip(probes_of(self.model, prompt, ref, adapter), probed(self.own_picture, adapter), strict=True)
            )
        ]
        try:
            first, second = [await probe.output() for probe in asked]
        except AdapterNotFinite:
            return Effect(len(prompt), math.inf, 0.0)
        finally:
            for probe in asked:
                await probe.aclose()
            self._tiers.offer(ref, None)
        if self.model.kind == "pool" or adapter.head is not None:
            return vector_effect_of(len(prompt), first.delta.pooled, second.delta.pooled)
        a, b = first.captured, second.captured
        if a is None or b is None:
            raise AdapterLoadFailed("The adapter's effect could not be measured.")
        return await asyncio.to_thread(effect_of, a, b)

    def _probe(
        self,
        name: str,
        prompt: list[int],
        params: SamplingParams,
        tried: AdapterRef | None,
        picture: Picture | None,
        tenant: str,
        weight: float,
    ) -> RunningGeneration:
        """A probe runs at the expense of the tenant's fair share."""
        captures, ids = params.task is Task.SCORE, list(prompt)
        seq = Sequence(name, ids, params, adapter=tried, tenant=tenant, weight=weight, capture_logits=captures)
        seq.sound, seq.picture = self.own_sound, picture
        return self._submit([seq])

    def tier_of(self, ref: AdapterRef) -> Tier:
        return self._tiers.tier_of(ref)

    def pin(self, ref: AdapterRef) -> None:
        self._tiers.set_pinned(ref, True)

    def unpin(self, ref: AdapterRef) -> None:
        self._tiers.set_pinned(ref, False)

    async def forget(self, ref: AdapterRef, *, heir: AdapterRef | None = None) -> None:
        """Wait for the last user, then free; see `interface.EngineClient`."""
        while any(ref in s.mix.refs for g in self._open for s in g.seqs):
            await asyncio.sleep(0.02)
        while not await asyncio.to_thread(self._tiers.forget, ref, _IDLE_WAIT_S, heir=heir):
            if not self._thread.is_alive():  # nobody is left to release it
                raise EngineDead("The engine has stopped, so the adapter stays in memory until the process ends.")

    # state

    def stats(self, tenant: str | None = None) -> EngineStats:
        """Of everybody, or of one tenant; see `interface.EngineClient`."""
        if tenant is not None:
            return self._stats_of(tenant)
        scheduler = self._engine.scheduler
        book = self._tiers.book
        residents = self._tiers.residents()
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._inbox),
            waiting_for_adapter=scheduler.num_waiting_for_adapter,
            kv_blocks_used=scheduler.blocks.num_used,
            kv_blocks_total=scheduler.blocks.num_blocks,
            slots_used=sum(1 for r in residents if r["users"]),
            slots_total=book.num_slots,
            device_tier_bytes=book.used_bytes,
            host_tier_bytes=self._tiers.host_bytes,
            preemptions=scheduler.num_preemptions,
            steps=self._engine.num_steps,
            snapshots=scheduler.blocks.snapshots.counts,
            resident=tuple(residents),
        )

    def _stats_of(self, tenant: str) -> EngineStats:
        scheduler = self._engine.scheduler
        running, waiting = scheduler.running_of(tenant), scheduler.waiting_of(tenant)
        users = Counter(ref.id for seq in running for ref in seq.mix.refs)
        visible = [
            {**row, "users": users[row["id"]]}
            for row in self._tiers.residents()
            if row["tenant"] in (tenant, PUBLIC_TENANT)
        ]
        return EngineStats(
            running=len(running),
            waiting=len(waiting),
            waiting_for_adapter=sum(seq.status is SequenceStatus.LOADING_ADAPTER for seq in waiting),
            kv_blocks_used=sum(len(seq.block_table) for seq in running),
            kv_blocks_total=scheduler.blocks.num_blocks,
            slots_used=sum(1 for row in visible if row["users"]),
            slots_total=self._tiers.book.num_slots,
            device_tier_bytes=sum(row["size_bytes"] for row in visible if row["tenant"] == tenant),
            host_tier_bytes=self._tiers.host_bytes_of(tenant),
            preemptions=scheduler.num_preemptions_of(tenant),
            resident=tuple(visible),
        )

    def residency(self) -> Residency:
        """Which adapters are in memory now."""
        return Residency(**self._tiers.residency())

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, wait for the running ones, abort what is left; see `interface.EngineClient`."""
        self.is_draining = True
        deadline = time.monotonic() + timeout_s
        while self._open and self.is_ready and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self._end_all()

    def _end_all(self) -> None:
        for generation in list(self._open):
            generation.put(Draining("The server shut down before this request was done."))
            self.leave(generation)

    async def close(self) -> None:
        """Stop the thread; requests that still run end with Draining, and later ones are refused."""
        self.is_draining = True
        self._end_all()
        self._is_stopping = True
        self._wake.set()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join)
        self._engine.close()
        await asyncio.to_thread(self._tiers.close)
        await asyncio.to_thread(self._grammars.close)
        await asyncio.to_thread(self.codec.close)

    # the engine's thread

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                outputs = self._empty_inbox()
                if self._engine.has_work:
                    self._place()
                outputs += self._engine.step()
                if outputs:
                    self._call_loop(partial(self._deliver, outputs))
                if not self._engine.made_progress:
                    self._wake.wait(_IDLE_WAIT_S)
                    self._wake.clear()
        except BaseException as error:  # noqa: BLE001 - whatever ends the engine must reach every waiting request
            cause = error.__cause__ if isinstance(error, Unrecoverable) and error.__cause__ else error
            self._failure = f"{type(cause).__name__}: {cause}"
            self._call_loop(self._fail_all)
            get_logger(__name__).exception("engine_died")

    def _empty_inbox(self) -> list[Output]:
        """Do what the event loop wants done; who it cannot be done for is told so, alone."""
        outputs: list[Output] = []
        while self._inbox:
            seqs, action = self._inbox.popleft()
            try:
                action()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is of these sequences alone
                outputs += self._engine.fail(seqs, error)
        return outputs

    def _place(self) -> None:
        """Where the threads run is a matter of speed: the engine goes on without."""
        try:
            self._before_step()
        except Exception:  # noqa: BLE001
            self._before_step = lambda: None
            get_logger(__name__).exception("threads_not_placed")

    def _call_loop(self, action: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(action)
        except RuntimeError:  # the loop has closed: nobody listens any more
            self._is_stopping = True

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            listener = output.seq.listener
            if listener is None:
                continue
            if output.delta.finish_reason is not None:
                self._close([output.seq])
            listener.put(output)

    def _fail_all(self) -> None:
        for generation in list(self._open):
            if (failure := self.failure) is not None:
                generation.put(failure)
            self._close([seq for seq in generation.seqs if seq.listener is not None])
        self._on_death()
