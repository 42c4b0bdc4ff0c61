"""The last minutes of traffic in memory: what `/v1/stats` adds to the engine's counts.

All of it is bounded: one dictionary for each of the last seconds with tokens, the newest finished requests for the
percentiles, the newest errors, and totals of the adapters used last.
"""

import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from manylora.api.record import RequestRecord
from manylora.engine.interface import AdapterRef, Tier
from manylora.errors import AdapterNotFinite

__all__ = ["Traffic", "TrafficKey", "percentiles"]

TrafficKey: TypeAlias = tuple[str, str | None]  # the tenant, and the id of the adapter

RATE_WINDOW_S: Final = 10
LIVE_WINDOW_S: Final = 30
LATENCY_WINDOW_S: Final = 300
TIMELINE_STEP_S: Final = 5
_MAX_FINISHED: Final = 2048
_MAX_ERRORS: Final = 50
_MAX_ADAPTERS: Final = 1024
_PERCENTILES: Final = (50, 95, 99)


@dataclass(slots=True)
class _Totals:
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)

    def add(self, finished: RequestRecord) -> None:
        self.requests += 1
        self.prompt_tokens += finished.prompt_tokens
        self.completion_tokens += finished.completion_tokens
        self.cached_tokens += finished.cached_tokens
        self.outcomes[finished.outcome] += 1

    def as_dict(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "prefix_cache_hit_tokens": self.cached_tokens,
            "outcomes": dict(self.outcomes),
        }


def percentiles(values: Iterable[float | None]) -> dict[str, float | None]:
    """`{"p50", "p95", "p99"}` by nearest rank in milliseconds, from seconds; None where there are no values."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return {f"p{p}": None for p in _PERCENTILES}
    last = len(ordered) - 1
    return {f"p{p}": round(ordered[min(last, math.ceil(p / 100 * len(ordered)) - 1)] * 1000, 3) for p in _PERCENTILES}


class Traffic:
    """Fed by every request, on the event loop's thread only. `clock` gives seconds that never go back."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.started_at = time.time()
        self._started = clock()
        self._active: Counter[str] = Counter()
        self._seconds: deque[tuple[int, Counter[TrafficKey]]] = deque(maxlen=LATENCY_WINDOW_S + 1)
        self._finished: deque[tuple[float, RequestRecord]] = deque(maxlen=_MAX_FINISHED)
        self._errors: deque[RequestRecord] = deque(maxlen=_MAX_ERRORS)
        self._client_errors: deque[RequestRecord] = deque(maxlen=_MAX_ERRORS)
        self._tenants: dict[str, _Totals] = {}
        self._adapters: OrderedDict[str, tuple[AdapterRef, _Totals]] = OrderedDict()

    # recording

    def begin(self, tenant: str) -> None:
        self._active[tenant] += 1

    def tick(self, key: TrafficKey, num_tokens: int, now: float) -> None:
        """`num_tokens` were generated at `now` (of the clock)."""
        second = int(now)
        if not self._seconds or self._seconds[-1][0] != second:
            self._seconds.append((second, Counter()))
        self._seconds[-1][1][key] += num_tokens

    def end(self, finished: RequestRecord) -> None:
        self._active[finished.tenant] -= 1
        self._finished.append((self._clock(), finished))
        self._tenants.setdefault(finished.tenant, _Totals()).add(finished)
        if finished.error is not None:
            (self._client_errors if finished.outcome == "invalid" else self._errors).append(finished)
        if finished.adapter is not None:
            ref, totals = self._adapters.setdefault(finished.adapter.id, (finished.adapter, _Totals()))
            self._adapters.move_to_end(ref.id)
            totals.add(finished)
            if len(self._adapters) > _MAX_ADAPTERS:
                self._adapters.popitem(last=False)

    # reading

    def view(self, tenant: str | None, tier_of: Callable[[AdapterRef], Tier]) -> dict[str, Any]:
        """What the dashboard draws; of one tenant's requests, or with None of everybody's."""
        now = self._clock()
        recent = [f for at, f in self._finished if now - at <= LATENCY_WINDOW_S and tenant in (None, f.tenant)]
        live = [f for at, f in self._finished if now - at <= LIVE_WINDOW_S and tenant in (None, f.tenant)]
        totals = self._totals(tenant)
        return {
            "now": round(time.time(), 3),
            "uptime_s": round(now - self._started, 1),
            "in_flight": sum(n for name, n in self._active.items() if tenant in (None, name)),
            "totals": totals.as_dict(),
            "rates": self._rates(tenant, now),
            "live": {
                "window_s": LIVE_WINDOW_S,
                "ttft_ms": percentiles(f.ttft_s for f in live),
                "tpot_ms": percentiles(f.tpot_s for f in live),
            },
            "latency": {
                "window_s": LATENCY_WINDOW_S,
                "ttft_ms": percentiles(f.ttft_s for f in recent),
                "tpot_ms": percentiles(f.tpot_s for f in recent),
                "queue_ms": percentiles(f.queue_s for f in recent),
                "duration_ms": percentiles(f.duration_s for f in recent if f.outcome == "ok"),
            },
            "adapters": self._adapter_rows(tenant, recent, now, tier_of),
            "recent_errors": [_error_row(f) for f in reversed(self._errors) if tenant in (None, f.tenant)],
        }

    def client_errors(self, tenant: str | None) -> list[dict[str, Any]]:
        """The newest requests that were at fault themselves, of one tenant or of all, the newest first."""
        return [_error_row(f) for f in reversed(self._client_errors) if tenant in (None, f.tenant)]

    def _totals(self, tenant: str | None) -> _Totals:
        if tenant is not None:
            return self._tenants.get(tenant, _Totals())
        total = _Totals()
        for one in self._tenants.values():
            total.requests += one.requests
            total.prompt_tokens += one.prompt_tokens
            total.completion_tokens += one.completion_tokens
            total.cached_tokens += one.cached_tokens
            total.outcomes.update(one.outcomes)
        return total

    def _rates(self, tenant: str | None, now: float) -> dict[str, float]:
        tokens = sum(n for (owner, _), n in self._last_seconds(now).items() if tenant in (None, owner))
        ended = sum(1 for at, f in self._finished if now - at <= RATE_WINDOW_S and tenant in (None, f.tenant))
        window = self._window(now)
        return {
            "window_s": RATE_WINDOW_S,
            "requests_per_s": round(ended / window, 3),
            "completion_tokens_per_s": round(tokens / window, 3),
        }

    def _window(self, now: float) -> float:
        """The rates' window, shorter while the server is younger."""
        return min(float(RATE_WINDOW_S), max(1.0, now - self._started))

    def _last_seconds(self, now: float) -> Counter[TrafficKey]:
        """Tokens of the last whole seconds by tenant and adapter, without the second that has just begun."""
        current, total = int(now), Counter[TrafficKey]()
        for second, tokens in reversed(self._seconds):
            if second < current - RATE_WINDOW_S:
                break
            if second < current:
                total.update(tokens)
        return total

    def timeline(self, tenant: str | None) -> dict[str, Any]:
        """The last five minutes every five seconds, measured at each moment as `view` measures now.

        `at` are Unix times, oldest first. Percentiles are None where too few requests are remembered.
        """
        now, unix_now = self._clock(), time.time()
        tokens = {second: _tokens_of(tenant, counts) for second, counts in self._seconds}
        finished = [(at, f) for at, f in self._finished if tenant in (None, f.tenant)]
        line: dict[str, Any] = {"at": [], "completion_tokens_per_s": [], "ttft_ms": [], "tpot_ms": []}
        for age in range(LATENCY_WINDOW_S - TIMELINE_STEP_S, 0, -TIMELINE_STEP_S):
            moment = now - age
            if moment < self._started:
                continue
            recent = [f for at, f in finished if 0 <= moment - at <= LIVE_WINDOW_S]
            seconds = range(int(moment) - RATE_WINDOW_S, int(moment))
            line["at"].append(round(unix_now - age, 3))
            rate = sum(tokens.get(second, 0) for second in seconds) / self._window(moment)
            line["completion_tokens_per_s"].append(round(rate, 3))
            line["ttft_ms"].append(percentiles(f.ttft_s for f in recent))
            line["tpot_ms"].append(percentiles(f.tpot_s for f in recent))
        return line

    def _adapter_rows(
        self, tenant: str | None, recent: list[RequestRecord], now: float, tier_of: Callable[[AdapterRef], Tier]
    ) -> list[dict[str, Any]]:
        """One row for each adapter version used within the window, the newest use first."""
        by_adapter: dict[str, list[RequestRecord]] = {}
        for finished in recent:
            if finished.adapter is not None:
                by_adapter.setdefault(finished.adapter.id, []).append(finished)
        tokens: Counter[str | None] = Counter()
        for (owner, adapter_id), count in self._last_seconds(now).items():
            if tenant in (None, owner):
                tokens[adapter_id] += count
        window = self._window(now)
        rows = []
        for adapter_id, (ref, totals) in reversed(self._adapters.items()):
            used = by_adapter.get(adapter_id)
            if used is None:
                continue
            row: dict[str, Any] = {
                "id": ref.id,
                "name": ref.name,
                "version": ref.version,
                "tenant": ref.tenant,
                "digest": ref.digest,
                "tier": tier_of(ref),
                "last_used": round(used[-1].finished_at, 3),
                "requests": len(used),
                "not_finite": sum(f.error is not None and f.error.code == AdapterNotFinite.code for f in used),
                "tokens_per_s": round(tokens[adapter_id] / window, 3),
                "ttft_ms": percentiles(f.ttft_s for f in used),
                "tpot_ms": percentiles(f.tpot_s for f in used),
            }
            if tenant is None:
                row["totals"] = totals.as_dict()
            rows.append(row)
        return rows


def _tokens_of(tenant: str | None, counts: Counter[TrafficKey]) -> int:
    return sum(n for (owner, _), n in counts.items() if tenant in (None, owner))


def _error_row(finished: RequestRecord) -> dict[str, Any]:
    assert finished.error is not None
    return {
        "at": round(finished.finished_at, 3),
        "request_id": finished.request_id,
        "tenant": finished.tenant,
        "adapter": finished.adapter.label if finished.adapter else None,
        "code": finished.error.code,
        "message": finished.error.message,
    }
