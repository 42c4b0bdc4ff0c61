"""From results to figures. Warm-up requests count in the totals (the server counted them too), nowhere else."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TypeVar

import numpy as np

from manylora_loadtest.discovery import Counters
from manylora_loadtest.load_meter import ClientLoad
from manylora_loadtest.results import ChangeResult, RequestResult
from manylora_loadtest.runner import Run, StageSpan
from manylora_loadtest.server_watch import ServerFigures, server_figures
from manylora_loadtest.thresholds import LATENCIES, SERVER_FIGURES, STATISTICS, Slo, ThresholdResult

__all__ = ["Fairness", "Figures", "Summary", "Totals", "fairness", "jain_index", "meets", "statistics", "summarise"]

K = TypeVar("K")
BASE_NAME = "(base)"
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True, slots=True)
class Totals:
    """Everything sent, the warm-up included."""

    requests: int
    ok: int
    prompt_tokens: int
    output_tokens: int
    outcomes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Figures:
    """Of a group of requests over `span_s` seconds. Latencies are in seconds, by name and statistic."""

    requests: int
    ok: int
    error_rate: float
    prompt_tokens: int
    output_tokens: int
    span_s: float
    requests_per_s: float
    output_tokens_per_s: float
    slo_attainment: float
    goodput_rps: float
    latency_s: dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Fairness:
    """How evenly tenants were served, each by what it asked for: its share of asked-for tokens that came in time.

    `jain_index`: (Σx)² / (n Σx²), 1 when all shares are equal, 1/n when one tenant gets everything.
    `share_ratio`: the largest share over the smallest. `tenant_ttft_ratio`: the same of the tenants' p95 TTFT.
    None where there is nothing to compare.
    """

    shares: dict[str, float]
    jain_index: float | None
    share_ratio: float | None
    tenant_ttft_ratio: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run showed. `rate_within_slo`: the highest rate of a sweep that still met the objective."""

    totals: Totals
    overall: Figures
    stages: list[tuple[StageSpan, Figures]]
    tenants: dict[str, Figures]
    adapters: dict[str, Figures]
    tiers: dict[str, Figures]
    fairness: Fairness
    client: ClientLoad
    num_changes: int
    num_failed_changes: int
    counters: Counters | None
    counter_mismatches: int | None
    usage: Counters | None
    usage_mismatches: int | None
    server: ServerFigures | None
    rate_within_slo: float | None
    thresholds: list[ThresholdResult] = field(default_factory=list)

    @property
    def is_passed(self) -> bool:
        return all(threshold.is_passed for threshold in self.thresholds)


def summarise(run: Run) -> Summary:
    """All figures of a run, and its scenario's thresholds checked against them."""
    slo = run.scenario.slo
    measured = [result for result in run.results if result.stage >= 0 and result.is_whole]
    span_s = _span_s(run.stages)
    totals = _totals(run.results)
    by_stage = group(measured, lambda r: r.stage)
    stages = [(s, figures(by_stage.get(s.index, []), slo, s.end_s - s.start_s)) for s in run.stages]
    tenants = _figures_by(measured, lambda r: r.tenant, slo, span_s)
    summary = Summary(
        totals=totals,
        overall=figures(measured, slo, span_s),
        stages=stages,
        tenants=tenants,
        adapters=_figures_by(measured, lambda r: r.adapter or BASE_NAME, slo, span_s),
        tiers=_figures_by([r for r in measured if r.load_tier], lambda r: r.load_tier or "", slo, span_s),
        fairness=fairness(measured, tenants, slo),
        client=run.client,
        num_changes=len(run.changes),
        num_failed_changes=_num_failed(run.changes),
        counters=run.counters,
        counter_mismatches=_mismatches(totals, run.counters),
        usage=run.usage,
        usage_mismatches=_mismatches(totals, run.usage),
        server=server_figures(run.server, *_ends_s(run.stages)),
        rate_within_slo=_rate_within(stages, slo),
    )
    summary.thresholds.extend(run.scenario.thresholds.check(threshold_figures(summary)))
    return summary


def threshold_figures(summary: Summary) -> dict[str, float | None]:
    """A value for every threshold there is; None where nothing could be measured."""
    overall = summary.overall
    values: dict[str, float | None] = {
        "error_rate": overall.error_rate if overall.requests else None,
        "requests_per_s": overall.requests_per_s,
        "output_tokens_per_s": overall.output_tokens_per_s,
        "goodput_rps": overall.goodput_rps,
        "slo_attainment": overall.slo_attainment if overall.requests else None,
        "rate_within_slo": summary.rate_within_slo,
        "jain_index": summary.fairness.jain_index,
        "share_ratio": summary.fairness.share_ratio,
        "tenant_ttft_ratio": summary.fairness.tenant_ttft_ratio,
        "change_failures": float(summary.num_failed_changes),
        "client_lag_p99_ms": summary.client.lag_p99_ms,
        "counter_mismatches": summary.counter_mismatches,
        "usage_mismatches": summary.usage_mismatches,
    }
    values |= dict.fromkeys(SERVER_FIGURES) if summary.server is None else asdict(summary.server)
    for name in LATENCIES:
        for statistic in STATISTICS:
            value = overall.latency_s[name].get(statistic)
            values[f"{name}_{statistic}_ms"] = None if value is None else value * 1000
    return values


def meets(result: RequestResult, slo: Slo) -> bool:
    """Whether a request kept the objective. An answer of one token has no TPOT to miss."""
    if not result.is_ok:
        return False
    values = {"ttft": result.ttft_s, "tpot": result.tpot_s, "e2e": result.e2e_s}
    return all((values[name] or 0.0) * 1000 <= limit for name, limit in slo.limits_ms.items())


def figures(results: Sequence[RequestResult], slo: Slo, span_s: float) -> Figures:
    """Figures of `results`, which arrived and were answered within `span_s` seconds."""
    ok = [result for result in results if result.is_ok]
    num_good = sum(meets(result, slo) for result in results)
    tokens = sum(result.output_tokens for result in ok)
    per_s = 1 / span_s if span_s > 0 else 0.0
    return Figures(
        requests=len(results),
        ok=len(ok),
        error_rate=1 - len(ok) / len(results) if results else 0.0,
        prompt_tokens=sum(result.prompt_tokens for result in ok),
        output_tokens=tokens,
        span_s=span_s,
        requests_per_s=len(ok) * per_s,
        output_tokens_per_s=tokens * per_s,
        slo_attainment=num_good / len(results) if results else 0.0,
        goodput_rps=num_good * per_s,
        latency_s={name: statistics(latencies(ok, name)) for name in LATENCIES},
    )


def latencies(results: Iterable[RequestResult], name: str) -> list[float]:
    """The latency `name` (`ttft`, `tpot`, `e2e`) of those results that have it, in seconds."""
    values = (getattr(result, f"{name}_s") for result in results)
    return [value for value in values if value is not None]


def statistics(values: Sequence[float]) -> dict[str, float]:
    """Mean, percentiles (linear interpolation) and maximum; empty for no values."""
    if not values:
        return {}
    array = np.asarray(values)
    quantiles = np.quantile(array, list(_QUANTILES.values()))
    named = dict(zip(_QUANTILES, map(float, quantiles), strict=True))
    return {"mean": float(array.mean()), **named, "max": float(array.max())}


def fairness(results: Sequence[RequestResult], tenants: Mapping[str, Figures], slo: Slo) -> Fairness:
    """Compares tenants; see `Fairness`. Unequal demand is not unfair: a share is of the tenant's own demand."""
    shares = {}
    for tenant, theirs in group(results, lambda r: r.tenant).items():
        asked = sum(result.asked_output_tokens for result in theirs)
        shares[tenant] = sum(r.asked_output_tokens for r in theirs if meets(r, slo)) / asked
    ttfts = [figure.latency_s["ttft"]["p95"] for figure in tenants.values() if figure.latency_s["ttft"]]
    is_comparable = len(tenants) > 1
    return Fairness(
        shares=shares,
        jain_index=jain_index(list(shares.values())) if is_comparable else None,
        share_ratio=_ratio(list(shares.values())) if is_comparable else None,
        tenant_ttft_ratio=_ratio(ttfts) if is_comparable and len(ttfts) == len(tenants) else None,
    )


def jain_index(shares: Sequence[float]) -> float:
    """(Σx)² / (n Σx²); 0 when nobody got anything, which is no kind of fairness worth passing."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 0.0


def _ratio(values: Sequence[float]) -> float:
    return max(values) / min(values) if min(values) > 0 else float("inf")


def group(results: Iterable[RequestResult], by: Callable[[RequestResult], K]) -> dict[K, list[RequestResult]]:
    """Results by key, keys in order of appearance."""
    groups: dict[K, list[RequestResult]] = {}
    for result in results:
        groups.setdefault(by(result), []).append(result)
    return groups


def _figures_by(
    results: Iterable[RequestResult], by: Callable[[RequestResult], str], slo: Slo, span_s: float
) -> dict[str, Figures]:
    return {name: figures(theirs, slo, span_s) for name, theirs in sorted(group(results, by).items())}


def _totals(results: Sequence[RequestResult]) -> Totals:
    ok = [result for result in results if result.is_ok]
    return Totals(
        requests=len(results),
        ok=len(ok),
        prompt_tokens=sum(result.prompt_tokens for result in ok),
        output_tokens=sum(result.output_tokens for result in ok),
        outcomes=dict(Counter(result.outcome for result in results).most_common()),
    )


def _span_s(stages: Sequence[StageSpan]) -> float:
    """Time in stages; what drains between them belongs to the earlier one."""
    return sum(stage.end_s - stage.start_s for stage in stages)


def _ends_s(stages: Sequence[StageSpan]) -> tuple[float, float]:
    return min((s.start_s for s in stages), default=0.0), max((s.end_s for s in stages), default=0.0)


def _num_failed(changes: Sequence[ChangeResult]) -> int:
    return sum(not change.is_ok for change in changes)


def _mismatches(totals: Totals, counters: Counters | None) -> int | None:
    """How many of the server's three totals differ from ours."""
    if counters is None:
        return None
    pairs = [
        (totals.ok, counters.requests_ok),
        (totals.prompt_tokens, counters.prompt_tokens),
        (totals.output_tokens, counters.completion_tokens),
    ]
    return sum(ours != theirs for ours, theirs in pairs)


def _rate_within(stages: Sequence[tuple[StageSpan, Figures]], slo: Slo) -> float | None:
    rates = [stage.rate for stage, figure in stages if stage.rate and figure.slo_attainment >= slo.attainment]
    has_rates = any(stage.rate for stage, _ in stages)
    return max(rates, default=0.0) if has_rates else None
