"""The terminal while a load runs: one table, redrawn twice a second from the last ten seconds' results."""

import asyncio
from collections import Counter
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from manylora_loadtest.results import RequestResult
from manylora_loadtest.runner import Progress
from manylora_loadtest.scenario import Scenario
from manylora_loadtest.summary import BASE_NAME, latencies, meets, statistics

__all__ = ["LiveView"]

_WINDOW_S: Final = 10.0
_EVERY_S: Final = 0.5
_LINE_EVERY_S: Final = 10.0
_NUM_ADAPTERS: Final = 8


class LiveView:
    """On a terminal a live table; elsewhere (a log, CI) one plain line every ten seconds."""

    def __init__(self, scenario: Scenario, console: Console) -> None:
        self._scenario = scenario
        self._console = console

    async def watch(self, progress: Progress) -> None:
        """Runs until cancelled."""
        if not self._console.is_terminal:
            while True:
                await asyncio.sleep(_LINE_EVERY_S)
                self._console.print(self.line(progress), highlight=False)
        with Live(self.table(progress), console=self._console, auto_refresh=False, transient=True) as live:
            while True:
                await asyncio.sleep(_EVERY_S)
                live.update(self.table(progress), refresh=True)

    def line(self, progress: Progress) -> Text:
        recent = _recent(progress)
        ttft = statistics(latencies(recent, "ttft"))
        return Text(
            f"{progress.now_s:6.0f} s  {progress.stage}: {len(progress.results)} of {progress.num_planned} done, "
            f"{progress.in_flight} in flight, {_num_failed(progress.results)} failed, "
            f"{_tokens_per_s(recent, progress):.0f} tokens/s, TTFT p95 {_ms(ttft.get('p95'))}"
        )

    def table(self, progress: Progress) -> Group:
        """The table as it is now."""
        recent = _recent(progress)
        done = len(progress.results)
        failed = _num_failed(progress.results)
        met = sum(meets(result, self._scenario.slo) for result in recent)
        head = Table.grid(padding=(0, 3))
        head.add_row(
            Text(self._scenario.name, style="bold"), Text(progress.stage), Text(f"{progress.now_s:.0f} s"),
            Text(f"{progress.in_flight} in flight"),
            Text(f"{failed} failed", style="red" if failed else "dim"),
            Text(f"{_tokens_per_s(recent, progress):.0f} tokens/s", style="bold"),
            Text(f"{met / len(recent):.0%} within SLO" if recent else "", style="green"),
        )  # fmt: skip
        parts: list[RenderableType] = [head, ProgressBar(total=max(1, progress.num_planned), completed=done, width=72)]
        parts += [_latency_table(recent), _adapter_table(recent)]
        if progress.changes:
            bad = sum(not change.is_ok for change in progress.changes)
            parts.append(Text(f"{len(progress.changes)} uploads and promotions, {bad} failed"))
        return Group(*parts)


def _latency_table(recent: list[RequestResult]) -> Table:
    table = Table(title=f"last {_WINDOW_S:.0f} s", title_justify="left", title_style="dim", box=None, padding=(0, 2))
    table.add_column("")
    columns = ("p50", "p95", "p99", "max")
    for column in columns:
        table.add_column(column, justify="right")
    for name in ("ttft", "tpot", "e2e"):
        values = statistics(latencies((r for r in recent if r.is_ok), name))
        table.add_row(name.upper(), *(_ms(values.get(column)) for column in columns))
    return table


def _adapter_table(recent: list[RequestResult]) -> Table:
    table = Table(box=None, padding=(0, 2))
    table.add_column("busiest adapters")
    for column in ("requests", "TTFT p95", "failed"):
        table.add_column(column, justify="right")
    counts = Counter(result.adapter or BASE_NAME for result in recent)
    for name, count in counts.most_common(_NUM_ADAPTERS):
        theirs = [result for result in recent if (result.adapter or BASE_NAME) == name]
        ttft = statistics(latencies(theirs, "ttft"))
        table.add_row(Text(name), str(count), _ms(ttft.get("p95")), str(_num_failed(theirs)))
    return table


def _recent(progress: Progress) -> list[RequestResult]:
    """Requests that ended in the last ten seconds; results are in order of their end."""
    recent: list[RequestResult] = []
    for result in reversed(progress.results):
        if result.end_s < progress.now_s - _WINDOW_S:
            break
        recent.append(result)
    return recent


def _tokens_per_s(recent: list[RequestResult], progress: Progress) -> float:
    window_s = min(_WINDOW_S, progress.now_s)
    return sum(result.output_tokens for result in recent) / window_s if window_s else 0.0


def _num_failed(results: list[RequestResult]) -> int:
    return sum(result.is_whole and not result.is_ok for result in results)


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1000:.0f} ms"
