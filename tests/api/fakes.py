"""A small engine, directory and gate, real enough to serve HTTP: no model, deterministic text."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from manylora.catalog.interface import PublishedAdapter
from manylora.chat.format import PLAIN_CHAT, ChatFormat, ChatOptions
from manylora.chat.pieces import Reader
from manylora.chat.reading import Reading
from manylora.engine.interface import (
    AdapterRef,
    CompiledGrammar,
    Delta,
    Effect,
    EncodedPair,
    EngineStats,
    FinishReason,
    Grammar,
    Mix,
    ModelInfo,
    Progress,
    RequestTiming,
    Residency,
    SamplingParams,
    Sound,
    Tier,
    TokenLogprob,
)
from manylora.errors import (
    AdapterNotFound,
    AuthenticationFailed,
    Draining,
    InvalidRequest,
    ManyloraError,
    QueueFull,
    QuotaExceeded,
)
from manylora.identity import PUBLIC_TENANT, OwnToken, Vocabulary
from manylora.images.picture import Picture
from manylora.lora.format.spec import Adapter
from manylora.tenants.interface import Principal, Role

VOCAB_SIZE = 1000
BOS = 0
NAMES = ("alpha", "beta")


class FakeCodec:
    """One token per character: its code point if that is small, BOS first; ids in the 900s spell odd bytes.

    `form` is how its chats are written, `opening` what its template begins an answer with.
    """

    def __init__(self) -> None:
        self.form = ChatFormat()
        self.opening = ""
        self.rendered: list[tuple[list[dict[str, Any]], ChatOptions]] = []

    SPLIT: ClassVar = {900: [0xE4], 901: [0xBD], 902: [0xA0]}  # the three bytes of 你

    def with_vocabulary(self, vocabulary: Vocabulary | None) -> "FakeCodec":
        return self

    def vocabulary_of(
        self, added: Sequence[OwnToken], end: str | None, size: int | None, num_rows: int, warnings: list[str]
    ) -> Vocabulary | None:
        return Vocabulary.of(size, added, next((each.id for each in added if each.content == end), None))

    def surely_exceeds(self, text: str, num_tokens: int) -> bool:
        return len(text) > num_tokens

    def encode_many(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        return [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]], *, add_special_tokens: bool = True) -> list[EncodedPair]:
        raise InvalidRequest("This tokenizer joins no texts.")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * add_special_tokens + [ord(c) % 900 for c in text]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return b"".join(bytes(self.token_bytes(i)) for i in token_ids if i != BOS or not skip_special_tokens).decode(
            errors="replace"
        )

    def token_text(self, token_id: int) -> str:
        return bytes(self.token_bytes(token_id)).decode(errors="replace")

    def token_bytes(self, token_id: int) -> list[int]:
        if token_id == BOS:
            return list(b"<s>")
        return self.SPLIT.get(token_id) or list(chr(token_id).encode())

    def token_name(self, token_id: int) -> str:
        return f"<{self.token_text(token_id)}>"

    @property
    def info(self) -> dict[str, Any]:
        return {"tokenizer_class": "FakeCodec", "eos_token": "</s>", "chat_template": "{{ messages }}"}

    def chat(self, messages: list[dict[str, Any]], options: ChatOptions = PLAIN_CHAT) -> list[int]:
        return self.encode(self.render_chat(messages, options))

    def render_chat(self, messages: list[dict[str, Any]], options: ChatOptions = PLAIN_CHAT) -> str:
        if any(m["role"] == "tool" for m in messages) and not self.form.takes_tools:
            raise InvalidRequest("The model's chat template has no place for the role 'tool'.")
        self.rendered.append((messages, options))
        more = {"tools": list(options.tools), "documents": list(options.documents), **options.variables}
        head = "".join(f"<{name}={json.dumps(value)}>" for name, value in more.items() if value)
        calls = (f"{m['content']}{json.dumps(m['tool_calls']) if 'tool_calls' in m else ''}" for m in messages)
        text = head + "".join(f"[{m['role']}]{said}" for m, said in zip(messages, calls, strict=True))
        return text if options.continue_final or not options.for_answer else text + "[assistant]" + self.opening

    def chat_format(self, template: str | None = None) -> ChatFormat:
        return self.form

    def close(self) -> None:
        """It has started nothing."""

    def response_reader(self, prompt: str, tools: Sequence[Mapping[str, Any]], *, only_one: bool) -> Reader:
        names = tuple(tool["function"]["name"] for tool in tools)
        return Reading(syntax="hermes", tools=names, only_one=only_one).reader()


@dataclass
class FakeGeneration:
    """Says `text` one character per delta, in every choice."""

    engine: "FakeEngine"
    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    adapter: AdapterRef | Mix | None
    tenant: str
    cache_salt: str | None = None
    priority: int = 0
    is_closed: bool = False
    num_output_tokens: int = 0

    @property
    def progress(self) -> Progress:
        return Progress(self.num_output_tokens, arrived_s=1.0, scheduled_s=1.0015, first_token_s=1.01225)

    @property
    def timing(self) -> RequestTiming:
        tier: Tier = "device" if self.adapter is None else "host"
        return RequestTiming(queue_ms=1.5, load_ms=2.5, load_tier=tier, ttft_ms=12.25)

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self._deltas()

    async def _deltas(self) -> AsyncIterator[Delta]:
        engine = self.engine
        if engine.error_at == 0:
            raise engine.error
        if self.params.pooling is not None:
            vector = np.array([len(self.prompt_ids), 2, -3, self.params.pooling == "mean"], np.float32)
            yield Delta(0, "", (), finish_reason=FinishReason.STOP, num_cached_tokens=1, pooled=vector)
            self.is_closed = True
            return
        ids = engine.script(self)
        if not ids:
            yield Delta(0, "", (), finish_reason=FinishReason.LENGTH, prompt_logprobs=self._prompt_logprobs())
        for step, token_id in enumerate(ids):
            await engine.pace()
            if step and engine.error_at == step:
                raise engine.error
            self.num_output_tokens += self.params.n
            for index in engine.choice_order(range(self.params.n)):
                yield self._delta(index, step, token_id, is_last=step == len(ids) - 1)
        self.is_closed = True

    def _delta(self, index: int, step: int, token_id: int, *, is_last: bool) -> Delta:
        reason = None
        if is_last:
            reason = FinishReason.STOP if self.engine.is_stopping_early(self) else FinishReason.LENGTH
        return Delta(
            index=index,
            text=self.engine.text_of(step, token_id),
            token_ids=(token_id,),
            logprobs=() if self.params.logprobs is None else (scored(token_id, self.params.logprobs),),
            finish_reason=self.engine.last_reason or reason if is_last else None,
            prompt_logprobs=self._prompt_logprobs() if step == 0 and index == 0 else (),
            num_cached_tokens=2 if step == 0 and index == 0 else 0,
            stop_reason=self.engine.last_stop if is_last else None,
        )

    def _prompt_logprobs(self) -> tuple[TokenLogprob, ...]:
        if self.params.prompt_logprobs is None:
            return ()
        first, *rest = self.prompt_ids
        return TokenLogprob(first, None), *(scored(i, self.params.prompt_logprobs) for i in rest)

    async def aclose(self) -> None:
        self.is_closed = True


def scored(token_id: int, num_top: int) -> TokenLogprob:
    top = tuple(((token_id + k) % VOCAB_SIZE, -0.5 - k) for k in range(num_top))
    return TokenLogprob(token_id, -0.5, top, 1)


@dataclass(frozen=True)
class FakeCompiled:
    """Implements `CompiledGrammar`."""

    grammar: Grammar


@dataclass
class FakeEngine:
    """Implements `EngineClient`. `text` is what it says; the attributes steer it."""

    text: str = "The quick brown fox jumps over the lazy dog"
    ids: tuple[int, ...] | None = None
    context_length: int = 256
    hidden_size: int = 4
    dimensions: tuple[int, ...] = ()
    step_s: float = 0.0
    error_at: int | None = None
    error: ManyloraError = field(default_factory=lambda: ManyloraError("the engine tripped"))
    last_reason: FinishReason | None = None
    last_stop: str | int | None = None
    refuse: ManyloraError | None = None
    refuse_grammar: ManyloraError | None = None
    compiled: list[tuple[str, Grammar]] = field(default_factory=list)
    max_open: int = 10_000
    max_choices: int = 10_000
    is_ready: bool = True
    is_draining: bool = False
    resident: Residency = field(default_factory=Residency)
    codec: FakeCodec = field(default_factory=FakeCodec)
    generations: list[FakeGeneration] = field(default_factory=list)
    choice_order: Callable[[range], Sequence[int]] = list

    @property
    def model(self) -> ModelInfo:
        return ModelInfo(
            name="base-model",
            context_length=self.context_length,
            vocab_size=VOCAB_SIZE,
            created=1_700_000_000,
            hidden_size=self.hidden_size,
            dimensions=self.dimensions,
        )

    def script(self, generation: FakeGeneration) -> tuple[int, ...]:
        ids = self.ids or tuple(ord(c) for c in self.text)
        if generation.adapter is not None:
            ids = tuple(ord(c) for c in f"{generation.adapter.label}: ") + ids
        for stop in generation.params.stop:
            found = self.codec.decode(ids).find(stop)
            ids = ids[:found] if found >= 0 else ids
        return ids[: generation.params.max_tokens]

    def is_stopping_early(self, generation: FakeGeneration) -> bool:
        return len(self.script(generation)) < generation.params.max_tokens

    def text_of(self, step: int, token_id: int) -> str:
        """Complete characters only, as the detokeniser gives them."""
        if self.ids is None:
            return self.codec.decode([token_id])
        before, after = self.codec.decode(self.ids[:step]), self.codec.decode(self.ids[: step + 1])
        return after.replace("\ufffd", "")[len(before.replace("\ufffd", "")) :]

    async def pace(self) -> None:
        await asyncio.sleep(self.step_s)

    @property
    def open(self) -> list[FakeGeneration]:
        return [g for g in self.generations if not g.is_closed]

    async def compile(self, grammar: Grammar, tenant: str) -> CompiledGrammar:
        self.compiled.append((tenant, grammar))
        if self.refuse_grammar is not None:
            raise self.refuse_grammar
        return FakeCompiled(grammar)

    def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        adapter: AdapterRef | Mix | None = None,
        tenant: str = "public",
        weight: float = 1.0,
        cache_salt: str | None = None,
        priority: int = 0,
        sound: Sound | None = None,
        picture: Picture | None = None,
    ) -> FakeGeneration:
        if self.is_draining:
            raise Draining("The server is shutting down.")
        if self.refuse is not None:
            raise self.refuse
        if len(self.open) >= self.max_open:
            raise QueueFull("The server's queue is full. Try again shortly.", retry_after_s=1.5)
        generation = FakeGeneration(self, request_id, tuple(prompt_ids), params, adapter, tenant, cache_salt, priority)
        self.generations.append(generation)
        return generation

    async def measure_effect(
        self, ref: AdapterRef, adapter: Adapter, *, tenant: str = "public", weight: float = 1.0
    ) -> Effect:
        return Effect(prompt_tokens=4, max_abs_logit_delta=1.0, kl=0.1)

    def tier_of(self, ref: AdapterRef) -> Tier:
        return "device"

    def pin(self, ref: AdapterRef) -> None: ...

    def unpin(self, ref: AdapterRef) -> None: ...

    async def forget(self, ref: AdapterRef, *, heir: AdapterRef | None = None) -> None: ...

    def residency(self) -> Residency:
        return self.resident

    def stats(self, tenant: str | None = None) -> EngineStats:
        mine = [g for g in self.open if tenant in (None, g.tenant)]
        residents = [{"id": "a1", "tenant": "acme", "slot": 0}, {"id": "b1", "tenant": "rival", "slot": 1}]
        return EngineStats(
            running=len(mine),
            kv_blocks_used=len(mine),
            kv_blocks_total=64,
            slots_used=1,
            slots_total=8,
            preemptions=3,
            resident=tuple(row for row in residents if tenant in (None, row["tenant"])),
        )

    async def drain(self, timeout_s: float) -> None:
        self.is_draining = True
        async with asyncio.timeout(timeout_s):
            while self.open:
                await asyncio.sleep(0.01)

    async def close(self) -> None: ...


def make_ref(name: str, version: int = 1, tenant: str = PUBLIC_TENANT) -> AdapterRef:
    return AdapterRef(
        id=f"{tenant}/{name}/{version}", tenant=tenant, name=name, version=version, digest=f"d{version}" * 8
    )


@dataclass
class FakeDirectory:
    """Implements `AdapterDirectory`: `alpha` (public, two versions, the first active) and `beta` (of `acme`)."""

    refs: tuple[AdapterRef, ...] = (make_ref("alpha", 1), make_ref("alpha", 2), make_ref("beta", 1, "acme"))
    active: dict[str, int] = field(default_factory=lambda: {"alpha": 1, "beta": 1})
    defaults: dict[str, str] = field(default_factory=dict)  # by label

    def rank_of(self, ref: AdapterRef) -> int:
        return 8 if ref in self.refs else 0

    def mix_of(self, ref: AdapterRef) -> Mix:
        return Mix.of(ref)

    def drawn(self, ref: AdapterRef, who: str) -> tuple[AdapterRef, str]:
        return ref, ""

    def defaults_of(self, ref: AdapterRef) -> str:
        return self.defaults.get(ref.label, "")

    def resolve(self, tenant: str, name: str, version: int | None = None) -> AdapterRef:
        wanted = self.active.get(name) if version is None else version
        for ref in self.refs:
            if ref.name == name and ref.version == wanted and ref.tenant in (tenant, PUBLIC_TENANT):
                return ref
        raise AdapterNotFound(f"{tenant} has no {name}@{version} but {self.refs}")

    def visible_to(self, tenant: str, start: str = "") -> Iterator[PublishedAdapter]:
        return (
            PublishedAdapter(ref, 1_700_000_000 + ref.version)
            for ref in self.refs
            if ref.tenant in (tenant, PUBLIC_TENANT) and self.active[ref.name] == ref.version and ref.name >= start
        )


@dataclass
class FakeLease:
    gate: "FakeGate"
    admitted: tuple[int, int]
    settled: tuple[int, int] | None = None

    def settle(self, prompt_tokens: int, completion_tokens: int) -> None:
        if self.settled is None:
            self.settled = prompt_tokens, completion_tokens


@dataclass
class FakeGate:
    """Implements `Gate`; with no keys it is open."""

    keys: dict[str, Principal] = field(default_factory=dict)
    leases: list[FakeLease] = field(default_factory=list)
    is_used_up: bool = False

    @property
    def is_open(self) -> bool:
        return not self.keys

    def authenticate(self, authorization: str | None) -> Principal:
        if self.is_open:
            return Principal(PUBLIC_TENANT, Role.ADMIN)
        principal = self.keys.get((authorization or "").removeprefix("Bearer "))
        if principal is None:
            raise AuthenticationFailed("No valid API key. Send 'Authorization: Bearer <key>'.")
        return principal

    async def admit(self, principal: Principal, prompt_tokens: int, max_completion_tokens: int) -> FakeLease:
        if self.is_used_up:
            raise QuotaExceeded("The quota of 10 requests per minute is used up.", retry_after_s=12.2)
        lease = FakeLease(self, (prompt_tokens, max_completion_tokens))
        self.leases.append(lease)
        return lease
