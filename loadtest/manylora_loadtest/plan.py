"""From a scenario and a seed to the requests themselves, drawn in full before the first one is sent.

The same scenario, seed and list of adapters give the same requests at the same times.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import orjson
from numpy.typing import NDArray

from manylora_loadtest.errors import ScenarioError
from manylora_loadtest.scenario import AdapterMix, RequestMix, Scenario
from manylora_loadtest.trace import TraceEntry, read_trace
from manylora_loadtest.words import random_text

__all__ = ["Plan", "PlannedRequest", "Stage", "make_plan"]


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request; `payload` is the JSON body. `at_s` is from its stage's start.

    `leave_after_s`: its client closes the connection then. `is_wrong`: the server must refuse it.
    """

    index: int
    stage: int
    at_s: float
    tenant: str
    adapter: str | None
    is_chat: bool
    prompt_tokens: int
    output_tokens: int
    payload: bytes
    leave_after_s: float | None = None
    is_wrong: bool = False

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.is_chat else "/v1/completions"


@dataclass(frozen=True, slots=True)
class Stage:
    """Requests sent under the same conditions: one rate, or one number of clients."""

    index: int
    requests: tuple[PlannedRequest, ...]
    rate: float | None = None
    concurrency: int | None = None
    duration_s: float | None = None

    @property
    def label(self) -> str:
        if self.concurrency is not None:
            return f"{self.concurrency} clients"
        return f"{self.rate:g} requests/s" if self.rate is not None else "trace"


@dataclass(frozen=True, slots=True)
class Plan:
    """All stages, and the warm-up before them."""

    warmup: tuple[PlannedRequest, ...]
    stages: tuple[Stage, ...]

    @property
    def num_requests(self) -> int:
        return sum(len(stage.requests) for stage in self.stages)


def make_plan(scenario: Scenario, base: str, adapters: Mapping[str, Sequence[str]]) -> Plan:
    """`adapters`: each tenant's adapters, most popular first. Raises ScenarioError."""
    maker = _Maker(scenario, base, adapters)
    if scenario.trace is not None:
        entries = read_trace(scenario.trace.path, scenario.trace.speed)
        stages: tuple[Stage, ...] = (maker.trace_stage(entries),)
    else:
        stages = tuple(maker.stage(index) for index in range(scenario.arrival.num_stages if scenario.arrival else 0))
    return Plan(maker.warmup(), stages)


class _Maker:
    """Draws requests; every kind of decision has its own stream of random numbers, so that changing one
    distribution leaves the others' draws alone."""

    def __init__(self, scenario: Scenario, base: str, adapters: Mapping[str, Sequence[str]]) -> None:
        self._scenario = scenario
        self._base = base
        self._adapters = adapters
        seeds = np.random.SeedSequence(scenario.seed).spawn(7)
        rngs = [np.random.default_rng(seed) for seed in seeds]
        self._time_rng, self._tenant_rng, self._adapter_rng, self._length_rng, self._chat_rng, self._text_rng = rngs[:6]
        self._ending_rng = rngs[6]
        chat = scenario.chat
        self._prefixes = [random_text(chat.prefix_tokens, self._text_rng) for _ in range(chat.num_prefixes)]
        self._num_made = 0

    def stage(self, index: int) -> Stage:
        arrival = self._scenario.arrival
        assert arrival is not None
        times = arrival.times(index, self._time_rng)
        tenants = self._draw_tenants(len(times))
        adapters = self._draw_adapters(tenants)
        mix = self._scenario.requests
        prompt_tokens = mix.prompt_tokens.draw(len(times), self._length_rng)
        output_tokens = mix.output_tokens.draw(len(times), self._length_rng)
        is_chat = self._chat_rng.random(len(times)) < self._scenario.chat.share
        drawn = zip(times, tenants, adapters, is_chat, prompt_tokens, output_tokens, strict=True)
        requests = tuple(
            self._ended_early(self._request(index, float(t), tenant, adapter, bool(chat), int(p), int(o)))
            for t, tenant, adapter, chat, p, o in drawn
        )
        if arrival.is_closed:
            return Stage(index, requests, concurrency=arrival.concurrency[index], duration_s=arrival.duration_s)
        return Stage(index, requests, rate=arrival.rate[index], duration_s=arrival.duration_s)

    def _ended_early(self, request: PlannedRequest) -> PlannedRequest:
        """Some are refused, and of the others some are left by their client."""
        mix = self._scenario.requests
        if not mix.left_share and not mix.refused_share:
            return request
        is_wrong, is_left = self._ending_rng.random(2) < (mix.refused_share, mix.left_share)
        leave_after_s = float(self._ending_rng.exponential(mix.left_after_s))
        if is_wrong:
            return replace(request, payload=_spoiled(request), is_wrong=True)
        return replace(request, leave_after_s=leave_after_s) if is_left else request

    def trace_stage(self, entries: Sequence[TraceEntry]) -> Stage:
        tenants = self._draw_tenants(len(entries))
        known = {tenant.name for tenant in self._scenario.tenants}
        for entry in entries:
            if entry.tenant is not None and entry.tenant not in known:
                raise ScenarioError(f"the trace names the tenant {entry.tenant!r}; the scenario has {sorted(known)}")
        requests = tuple(
            self._request(0, e.t, e.tenant or tenant, e.adapter, e.chat, self._own_words(e), e.output_tokens)
            for e, tenant in zip(entries, tenants, strict=True)
        )
        return Stage(0, requests)

    def warmup(self) -> tuple[PlannedRequest, ...]:
        """Each tenant's adapters in turn, tenant after tenant."""
        pairs: list[tuple[str, str | None]] = [
            (tenant, name) for tenant, names in self._adapters.items() for name in names
        ]
        pairs = pairs or [(self._scenario.tenants[0].name, None)]
        mix = self._scenario.requests
        count = self._scenario.warmup_requests
        rng = np.random.default_rng(self._scenario.seed + 1)
        prompts, outputs = mix.prompt_tokens.draw(count, rng), mix.output_tokens.draw(count, rng)
        return tuple(
            self._request(-1, 0.0, *pairs[i % len(pairs)], False, int(prompts[i]), int(outputs[i]))
            for i in range(count)
        )

    def _own_words(self, entry: TraceEntry) -> int:
        """A traced chat's length includes the common prefix that it will get."""
        return max(1, entry.prompt_tokens - (self._scenario.chat.prefix_tokens if entry.chat else 0))

    def _draw_tenants(self, count: int) -> list[str]:
        names = [tenant.name for tenant in self._scenario.tenants]
        weights = np.array([tenant.weight for tenant in self._scenario.tenants])
        drawn = self._tenant_rng.choice(len(names), size=count, p=weights / weights.sum())
        return [names[i] for i in drawn]

    def _draw_adapters(self, tenants: Sequence[str]) -> list[str | None]:
        """One per request, each tenant's from its own mix and list."""
        drawn: list[str | None] = [None] * len(tenants)
        for tenant in self._scenario.tenants:
            places = [i for i, name in enumerate(tenants) if name == tenant.name]
            mix = tenant.adapters or self._scenario.adapters
            for place, adapter in zip(places, self._draw(mix, self._adapters[tenant.name], len(places)), strict=True):
                drawn[place] = adapter
        return drawn

    def _draw(self, mix: AdapterMix, names: Sequence[str], count: int) -> list[str | None]:
        if not names:
            return [None] * count
        ranks: NDArray[np.int64] = mix.popularity.draw(len(names), count, self._adapter_rng)
        is_base = self._adapter_rng.random(count) < mix.base_share
        return [None if base else names[rank] for rank, base in zip(ranks, is_base, strict=True)]

    def _request(
        self, stage: int, at_s: float, tenant: str, adapter: str | None, is_chat: bool, prompt: int, output: int
    ) -> PlannedRequest:
        text = random_text(prompt, self._text_rng)
        body = _body(self._scenario.requests, adapter or self._base, output)
        if is_chat:
            body["messages"] = self._messages(text)
            prompt += self._scenario.chat.prefix_tokens
        else:
            body["prompt"] = text
        self._num_made += 1
        return PlannedRequest(
            self._num_made - 1, stage, at_s, tenant, adapter, is_chat, prompt, output, orjson.dumps(body)
        )

    def _messages(self, text: str) -> list[dict[str, str]]:
        messages = [{"role": "user", "content": text}]
        if self._scenario.chat.prefix_tokens:
            prefix = self._prefixes[int(self._chat_rng.integers(len(self._prefixes)))]
            messages.insert(0, {"role": "system", "content": prefix})
        return messages


def _spoiled(request: PlannedRequest) -> bytes:
    """The body with one thing wrong, another one for each request."""
    body = orjson.loads(request.payload)
    wrong: tuple[dict[str, object], ...] = (
        {"temperature": 99},
        {"no_such_field": "x" * 1000},
        {"model": "no-such-adapter"},
        {"max_tokens": 10**6},
        {"logit_bias": {"word": 1}},
    )
    turn = request.index % (len(wrong) + 1)
    return request.payload[:-1] if turn == len(wrong) else orjson.dumps({**body, **wrong[turn]})


def _body(mix: RequestMix, model: str, output_tokens: int) -> dict[str, object]:
    body: dict[str, object] = {
        "model": model,
        "max_tokens": output_tokens,
        "temperature": mix.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if mix.ignore_eos:
        body["ignore_eos"] = True
    return body
