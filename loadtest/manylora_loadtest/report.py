"""One HTML file that shows a run: it loads nothing, runs no script, and every value in it is escaped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from manylora_loadtest.plots import adapter_heat_map, latency_cdfs, slo_against_rate, timeline
from manylora_loadtest.runner import Run
from manylora_loadtest.summary import Figures, Summary
from manylora_loadtest.thresholds import STATISTICS

__all__ = ["render_report", "write_report"]

_MAX_ERRORS = 12


def write_report(path: Path, run: Run, summary: Summary) -> None:
    path.write_text(render_report(run, summary), encoding="utf-8")


def render_report(run: Run, summary: Summary) -> str:
    """The page's HTML."""
    environment = Environment(
        loader=PackageLoader("manylora_loadtest", ""), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"ms": _ms, "number": _number, "share": _share, "limit": _limit}
    return environment.get_template("report.html").render(
        run=run,
        summary=summary,
        statistics=STATISTICS,
        plots=_plots(run, summary),
        adapters=_busiest(summary.adapters),
        errors=_errors(run),
        num_ok_changes=summary.num_changes - summary.num_failed_changes,
    )


def _plots(run: Run, summary: Summary) -> dict[str, str]:
    """SVG by title; the template marks it safe, as matplotlib escapes the text it draws."""
    if not any(result.stage >= 0 for result in run.results):
        return {}
    return {
        "Latency": latency_cdfs(run),
        "Objective against load": slo_against_rate(run, summary),
        "Timeline": timeline(run),
        "Adapters over time": adapter_heat_map(run),
    }


def _busiest(adapters: Mapping[str, Figures]) -> list[tuple[str, Figures]]:
    return sorted(adapters.items(), key=lambda item: -item[1].requests)[:100]


def _errors(run: Run) -> list[tuple[str, str, int]]:
    """The most frequent failures: outcome, message, how often."""
    counts: dict[tuple[str, str], int] = {}
    for result in run.results:
        if result.is_whole and not result.is_ok:
            counts[result.outcome, result.error] = counts.get((result.outcome, result.error), 0) + 1
    for change in run.changes:
        if not change.is_ok:
            key = f"{change.kind} {change.adapter}", change.error
            counts[key] = counts.get(key, 0) + 1
    ranked = sorted(counts.items(), key=lambda item: -item[1])[:_MAX_ERRORS]
    return [(outcome, error, count) for (outcome, error), count in ranked]


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    milliseconds = seconds * 1000
    return f"{milliseconds:,.1f}" if milliseconds < 100 else f"{milliseconds:,.0f}"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:,.2f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _limit(value: Any) -> str:
    return "not measured" if value is None else f"{value:,.4g}"
