"""Everything that `/metrics` exposes: one object with its own registry, handed to whoever records.

Cost is paid per request or per step, never per token: a request's inter-token gaps are observed together when
it ends. The engine's gauges are read when somebody scrapes.

Labels are bounded. `tenant` and `adapter` are the caller's tenant and the adapter's name, `__base__` for the
bare base and `__other__` for names without a label of their own; `metric_labels` says who gets one. Where an
adapter is moved between tiers, nobody calls: `tenant` is then the adapter's owner.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import ClassVar, Final, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from manylora.metric_labels import BASE_LABEL, OTHER_LABEL, BusiestNames, Labels

__all__ = [
    "BASE_LABEL",
    "BUCKETS",
    "OTHER_LABEL",
    "OUTCOMES",
    "EndedRequest",
    "EngineCounts",
    "Metrics",
    "NoMetrics",
]

BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
OUTCOMES: Final = ("ok", "cancelled", "invalid", "rejected", "error")
FAULT_PHASES: Final = ("request", "schedule", "forward", "sample", "deliver")
FAULT_RESULTS: Final = ("retried", "isolated", "fatal")
METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
JOB_STATUSES: Final = ("queued", "running", "publishing", "judging", "paused")
_PREFIX: Final = "manylora"
_BY_CALLER: Final = ("tenant", "adapter")  # who asks, and for what
_BY_OWNER: Final = ("tenant", "adapter")  # whose adapter it is
_BY_VERSION: Final = (*_BY_CALLER, "version")


class Snapshots(Protocol):
    """Copies of recurrent states: `engine.counts.SnapshotCounts` has this shape."""

    @property
    def used(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def hits(self) -> int: ...


class EngineCounts(Protocol):
    """What the gauges read: `engine.counts.EngineStats` has this shape."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def waiting_for_adapter(self) -> int: ...
    @property
    def kv_blocks_used(self) -> int: ...
    @property
    def kv_blocks_total(self) -> int: ...
    @property
    def slots_used(self) -> int: ...
    @property
    def slots_total(self) -> int: ...
    @property
    def device_tier_bytes(self) -> int: ...
    @property
    def host_tier_bytes(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def snapshots(self) -> Snapshots: ...


class EndedRequest(Protocol):
    """What the metrics read of a request for text: `api.record.RequestRecord` has this shape.

    Times are seconds; None where the request never got that far. `tried_version` is None where no canary decided.
    """

    @property
    def tenant(self) -> str: ...
    @property
    def adapter_name(self) -> str | None: ...
    @property
    def tried_version(self) -> int | None: ...
    @property
    def outcome(self) -> str: ...
    @property
    def duration_s(self) -> float: ...
    @property
    def ttft_s(self) -> float | None: ...
    @property
    def queue_s(self) -> float | None: ...
    @property
    def load_tier(self) -> str | None: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def drafted_tokens(self) -> int: ...
    @property
    def accepted_tokens(self) -> int: ...
    @property
    def sound_s(self) -> float: ...
    @property
    def gaps_s(self) -> Sequence[float]: ...


class _EngineCollector(Collector):
    """Reads the engine's counts when scraped."""

    _GAUGES: Final = (
        ("requests_running", "Sequences in the running batch.", "running"),
        ("requests_waiting", "Sequences that wait to be admitted.", "waiting"),
        ("requests_waiting_for_adapter", "Sequences that wait for their adapter.", "waiting_for_adapter"),
        ("kv_blocks_used", "KV cache blocks held by sequences.", "kv_blocks_used"),
        ("kv_blocks_total", "KV cache blocks there are.", "kv_blocks_total"),
        ("adapter_slots_used", "Device slots whose adapter running sequences use.", "slots_used"),
        ("adapter_slots_total", "Device slots there are.", "slots_total"),
        ("device_tier_bytes", "Bytes of adapters on the device.", "device_tier_bytes"),
        ("host_tier_bytes", "Bytes of adapters in host memory.", "host_tier_bytes"),
        ("state_snapshots_used", "Copies of recurrent states that prefixes are found again with.", "snapshots.used"),
        ("state_snapshots_total", "Rooms for copies of recurrent states.", "snapshots.total"),
        ("state_snapshot_bytes", "Bytes of the copies of recurrent states.", "snapshots.bytes"),
    )

    _COUNTERS: Final = (
        ("preemptions", "Sequences put back because blocks ran out.", "preemptions"),
        ("state_snapshot_hits", "Sequences that began with a copy of recurrent states.", "snapshots.hits"),
    )

    def __init__(self, read: Callable[[], EngineCounts]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        return self._families(lambda _: None)

    def collect(self) -> Iterable[Metric]:
        counts = self._read()
        return self._families(lambda field: attrgetter(field)(counts))

    def _families(self, value: Callable[[str], float | None]) -> Iterator[Metric]:
        for made, table in ((GaugeMetricFamily, self._GAUGES), (CounterMetricFamily, self._COUNTERS)):
            yield from (made(f"{_PREFIX}_{name}", text, value=value(field)) for name, text, field in table)


class _WithoutCreated(CollectorRegistry):
    """A view of a registry without the `_created` samples, which would double the number of counters."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__()
        self._all = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._all.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class _Series:
    """The children of one (tenant, adapter) pair, looked up once.

    Every outcome is there from the first request on: of a counter that appears with its first count, Prometheus
    sees no increase.
    """

    def __init__(self, metrics: "Metrics", tenant: str, adapter: str) -> None:
        self.requests = {outcome: metrics.requests.labels(tenant, adapter, outcome) for outcome in OUTCOMES}
        self.duration = metrics.request_duration.labels(tenant, adapter)
        self.ttft = metrics.time_to_first_token.labels(tenant, adapter)
        self.gap = metrics.inter_token_latency.labels(tenant, adapter)
        self.queue = metrics.queue_wait.labels(tenant, adapter)
        self.prompt_tokens = metrics.prompt_tokens.labels(tenant, adapter)
        self.completion_tokens = metrics.completion_tokens.labels(tenant, adapter)
        self.cached_tokens = metrics.prefix_cache_hit_tokens.labels(tenant, adapter)
        self.drafted_tokens = metrics.drafted_tokens.labels(tenant, adapter)
        self.accepted_tokens = metrics.accepted_tokens.labels(tenant, adapter)
        self.sound = metrics.sound.labels(tenant, adapter)


class Metrics:
    """The registry and the methods that record into it.

    `observe_request` is called on the event loop's thread only; every other method is safe on any thread.
    """

    is_on: ClassVar[bool] = True

    def __init__(self, *, free_labels: int = 32, reserve_labels: int = 32) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._callers = Labels(free_labels, reserve_labels)
        self._owners = Labels(free_labels, reserve_labels)
        self._owners_lock = threading.Lock()
        self._versions = BusiestNames(free_labels, reserve_labels)
        self._series: dict[tuple[str, str], _Series] = {}
        self.request_duration = self._histogram("request_duration_seconds", "Arrival to last token.", _BY_CALLER)
        self.time_to_first_token = self._histogram("time_to_first_token_seconds", "Arrival to first token.", _BY_CALLER)
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of one choice.", _BY_CALLER
        )
        self.queue_wait = self._histogram("queue_wait_seconds", "Arrival to first scheduled step.", _BY_CALLER)
        by_tier = (*_BY_OWNER, "tier")
        text = "Bringing an adapter up one tier, by the tier it left."
        self.adapter_load = self._histogram("adapter_load_seconds", text, by_tier)
        self.step_duration = self._histogram("step_duration_seconds", "One engine step, by phase.", ("phase",))
        self.requests = self._counter("requests", "Inference requests by outcome.", (*_BY_CALLER, "outcome"))
        self._count_tokens()
        self.adapter_requests_by_tier = self._counter(
            "adapter_requests_by_tier", "Requests by the tier their adapter was in on arrival.", (*_BY_CALLER, "tier")
        )
        self.adapter_load_failures = self._counter(
            "adapter_load_failures", "Loads of an adapter that failed, on the way to the device.", _BY_OWNER
        )
        self.adapter_evictions = self._counter("adapter_evictions", "Adapters evicted from a tier.", by_tier)
        self.adapter_not_finite = self._counter(
            "adapter_not_finite", "Sequences of one adapter, in no mix, ended by NaN or infinite logits.", _BY_OWNER
        )
        self.step_failures = self._counter(
            "engine_step_failures", "Engine steps in which something raised, by phase and result.", ("phase", "result")
        )
        for phase in FAULT_PHASES:
            for result in FAULT_RESULTS:
                self.step_failures.labels(phase, result)
        self.structured_requests = self._counter(
            "structured_requests",
            "Requests held to a grammar, by its kind and by whether it was ready (`hit`) or had to be made (`miss`).",
            ("kind", "cache"),
        )
        text = "Making a grammar ready, or finding that it cannot be followed."
        self.grammar_compile = self._histogram("grammar_compile_seconds", text, ("result",))
        self.uploads = self._counter("uploads", "Adapter uploads by result.", ("tenant", "result"))
        text = "Reads of an adapter's stored files that were not those that were stored."
        self.adapter_files_damaged = self._counter("adapter_files_damaged", text, ())
        self.adapter_orphans = self._gauge("adapter_orphans", "Adapters whose files were set aside.")
        self.quota_fallback = self._counter(
            "quota_fallback", "Requests admitted by this server's part of a quota, as the database did not answer.", ()
        )
        self._count_jobs()
        self._count_canaries()
        self.connections_ended = self._counter("connections_ended", "Connections that a bound ended.", ("reason",))
        text = "HTTP requests by route and status."
        self.answers = self._counter("http_requests", text, ("method", "route", "status"))

    def _count_jobs(self) -> None:
        self.jobs = self._gauge("fine_tuning_jobs", "Jobs that have not ended, by status.", ("status",))
        self.job_workers = self._gauge("fine_tuning_workers", "Workers for this base that were seen lately.")
        self.jobs_published = self._counter(
            "fine_tuning_published", "Results of jobs that this server published, or could not, by result.", ("result",)
        )

    def _count_canaries(self) -> None:
        text = "Requests for the name of an adapter with a canary, by the version that answered."
        self.canary_requests = self._counter("canary_requests", text, (*_BY_VERSION, "outcome"))
        self.canary_ttft = self._histogram("canary_time_to_first_token_seconds", "First token of these.", _BY_VERSION)

    def _count_tokens(self) -> None:
        self.prompt_tokens = self._counter(
            "prompt_tokens", "Prompt tokens of finished requests, and of uploads' effect probes.", _BY_CALLER
        )
        self.completion_tokens = self._counter("completion_tokens", "Tokens generated.", _BY_CALLER)
        self.drafted_tokens = self._counter("drafted_tokens", "Tokens of answers guessed and run.", _BY_CALLER)
        self.accepted_tokens = self._counter("accepted_draft_tokens", "Guessed tokens that were right.", _BY_CALLER)
        self.sound = self._counter("sound_seconds", "Seconds of sound written down.", _BY_CALLER)
        self.prefix_cache_hit_tokens = self._counter(
            "prefix_cache_hit_tokens", "Prompt tokens taken from the prefix cache.", _BY_CALLER
        )

    def _histogram(self, name: str, text: str, labels: tuple[str, ...]) -> Histogram:
        return Histogram(f"{_PREFIX}_{name}", text, labels, buckets=BUCKETS, registry=self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"{_PREFIX}_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"{_PREFIX}_{name}", text, labels, registry=self.registry)

    def watch_engine(self, read: Callable[[], EngineCounts], is_ready: Callable[[], bool]) -> None:
        """Expose the gauges that `read()` and `is_ready()` give; called once, when the engine exists."""
        self.registry.register(_EngineCollector(read))
        ready = self._gauge("engine_ready", "1 while the engine steps, 0 once it has died.")
        ready.set_function(lambda: float(is_ready()))

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(_WithoutCreated(self.registry))

    # recorded by the API

    def observe_request(self, request: EndedRequest) -> None:
        """Record one ended request, whatever its outcome."""
        name, tier = request.adapter_name, request.load_tier
        tenant, adapter = self._callers.of(request.tenant, BASE_LABEL if name is None else name)
        series = self._series.get((tenant, adapter))
        if series is None:
            series = self._series[tenant, adapter] = _Series(self, tenant, adapter)
        series.requests[request.outcome].inc()
        series.duration.observe(request.duration_s)
        if request.ttft_s is not None:
            series.ttft.observe(request.ttft_s)
        if request.queue_s is not None:
            series.queue.observe(request.queue_s)
        if tier is not None and name is not None:
            self.adapter_requests_by_tier.labels(tenant, adapter, tier).inc()
        series.prompt_tokens.inc(request.prompt_tokens)
        series.completion_tokens.inc(request.completion_tokens)
        series.cached_tokens.inc(request.cached_tokens)
        series.drafted_tokens.inc(request.drafted_tokens)
        series.accepted_tokens.inc(request.accepted_tokens)
        series.sound.inc(request.sound_s)
        for gap in request.gaps_s:
            series.gap.observe(gap)
        if request.tried_version is not None:
            self._observe_canary(request, tenant, adapter, request.tried_version)

    def _observe_canary(self, request: EndedRequest, tenant: str, adapter: str, version: int) -> None:
        has_label = self._versions.see((tenant, adapter, version)) and adapter != OTHER_LABEL
        labels = (tenant, adapter, str(version) if has_label else OTHER_LABEL)
        for outcome in OUTCOMES:  # see `_Series`
            self.canary_requests.labels(*labels, outcome).inc(outcome == request.outcome)
        if request.ttft_s is not None:
            self.canary_ttft.labels(*labels).observe(request.ttft_s)

    def count_answer(self, method: str, route: str | None, status: int | None) -> None:
        """An HTTP request ended. `route` is None where none has its path, `status` where the client left before it."""
        if route is None or method not in METHODS:
            method = route = OTHER_LABEL
        self.answers.labels(method, route, "none" if status is None else str(status)).inc()

    # recorded by the engine and the catalog

    def count_probe(self, tenant: str, adapter: str, prompt_tokens: int) -> None:
        """What was run for a tenant's upload, by no request of its own."""
        self.prompt_tokens.labels(*self._callers.of(tenant, adapter)).inc(prompt_tokens)

    def observe_step(self, phase: str, seconds: float) -> None:
        """One phase (`schedule`, `forward`, `sample`, `deliver`) of one engine step."""
        self.step_duration.labels(phase).observe(seconds)

    def count_step_failure(self, phase: str, result: str) -> None:
        """A step raised in one of `FAULT_PHASES`, with one of `FAULT_RESULTS`."""
        self.step_failures.labels(phase, result).inc()

    def count_not_finite(self, tenant: str, adapter: str) -> None:
        """A sequence of an adapter of `tenant` ended because its logits were not finite."""
        self.adapter_not_finite.labels(*self._owner(tenant, adapter)).inc()

    def count_structured_request(self, kind: str, is_known: bool) -> None:
        """A request asked to be held to a grammar of a kind (`grammars.grammar.GrammarKind`)."""
        self.structured_requests.labels(kind, "hit" if is_known else "miss").inc()

    def observe_grammar_compile(self, seconds: float, result: str) -> None:
        """A grammar was made ready (`ok`) or refused (`refused`)."""
        self.grammar_compile.labels(result).observe(seconds)

    def observe_adapter_load(self, tenant: str, adapter: str, tier: str, seconds: float) -> None:
        """An adapter of `tenant` went up from `tier`: `disk` (read into host memory) or `host` (to the device)."""
        self.adapter_load.labels(*self._owner(tenant, adapter), tier).observe(seconds)

    def count_load_failure(self, tenant: str, adapter: str) -> None:
        """An adapter of `tenant` that was asked for could not be brought to the device."""
        self.adapter_load_failures.labels(*self._owner(tenant, adapter)).inc()

    def count_eviction(self, tenant: str, adapter: str, tier: str) -> None:
        """An adapter of `tenant` left `tier` (`device` or `host`) to make room."""
        self.adapter_evictions.labels(*self._owner(tenant, adapter), tier).inc()

    def _owner(self, tenant: str, adapter: str) -> tuple[str, str]:
        with self._owners_lock:
            return self._owners.of(tenant, adapter)

    def count_upload(self, tenant: str, result: str) -> None:
        """An upload for `tenant` ended: `created`, `unchanged`, `refused`, `cancelled` or `failed`."""
        self.uploads.labels(self._callers.tenant(tenant), result).inc()

    def count_damaged(self) -> None:
        """An adapter's stored files were read and are gone or not those that were stored."""
        self.adapter_files_damaged.inc()

    def count_quota_fallback(self) -> None:
        """The quotas of all servers together could not be asked."""
        self.quota_fallback.inc()

    def show_orphans(self, count: int) -> None:
        """So many adapters' files lie in `orphans/`."""
        self.adapter_orphans.set(count)

    def show_jobs(self, counts: Mapping[str, int], num_workers: int) -> None:
        """So many jobs for the base have each status, and so many workers take them up."""
        for status in JOB_STATUSES:
            self.jobs.labels(status).set(counts.get(status, 0))
        self.job_workers.set(num_workers)

    def count_published(self, result: str) -> None:
        """What a job came to is a version (`succeeded`), cannot be one (`refused`), or not now (`failed`)."""
        self.jobs_published.labels(result).inc()

    def count_connection_ended(self, reason: str) -> None:
        """A bound of `connections` ended a connection."""
        self.connections_ended.labels(reason).inc()


class NoMetrics(Metrics):
    """Records nothing and has nothing to show, for servers that run with metrics switched off."""

    is_on: ClassVar = False

    def observe_request(self, request: EndedRequest) -> None: ...

    def observe_step(self, phase: str, seconds: float) -> None: ...

    def count_step_failure(self, phase: str, result: str) -> None: ...

    def count_not_finite(self, tenant: str, adapter: str) -> None: ...

    def count_structured_request(self, kind: str, is_known: bool) -> None: ...

    def observe_grammar_compile(self, seconds: float, result: str) -> None: ...

    def observe_adapter_load(self, tenant: str, adapter: str, tier: str, seconds: float) -> None: ...

    def count_load_failure(self, tenant: str, adapter: str) -> None: ...

    def count_eviction(self, tenant: str, adapter: str, tier: str) -> None: ...

    def count_upload(self, tenant: str, result: str) -> None: ...

    def count_probe(self, tenant: str, adapter: str, prompt_tokens: int) -> None: ...

    def count_damaged(self) -> None: ...
    def count_quota_fallback(self) -> None: ...
    def show_orphans(self, count: int) -> None: ...

    def show_jobs(self, counts: Mapping[str, int], num_workers: int) -> None: ...

    def count_published(self, result: str) -> None: ...

    def count_connection_ended(self, reason: str) -> None: ...

    def count_answer(self, method: str, route: str | None, status: int | None) -> None: ...
