"""The report's plots, as SVG text without a reference to anything outside. Needs matplotlib (extra `loadtest`)."""

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np

from manylora_loadtest.results import RequestResult
from manylora_loadtest.runner import Run
from manylora_loadtest.summary import BASE_NAME, Summary, group, latencies

__all__ = ["adapter_heat_map", "latency_cdfs", "slo_against_rate", "svg", "timeline"]

_INK: Final = "#7a828e"  # readable on the report's light and dark grounds
_COLOURS: Final = ("#2f7ed8", "#e07a1f", "#2a9d6f", "#b84a9b", "#8a6d3b", "#5560c9")
_BAD: Final = "#d64545"
_STYLE: Final = {
    "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
    "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none", "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": _INK, "grid.alpha": 0.18,
    "legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "manylora", "font.family": "sans-serif",
}  # fmt: skip
_MAX_BINS: Final = 60
_MAX_ADAPTERS: Final = 40
_NICE_S: Final = (0.25, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600)


@contextmanager
def _figure(width: float, height: float, *, rows: int = 1, columns: int = 1) -> Iterator[tuple[Any, Any]]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    with mpl.rc_context(_STYLE):
        figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)
        try:
            yield figure, axes
        finally:
            pyplot.close(figure)


def svg(figure: Any) -> str:
    """The figure as an `<svg>` element for HTML: no prologue, no metadata, no namespace addresses."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    return re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)


def latency_cdfs(run: Run) -> str:
    """Cumulative shares of TTFT, TPOT and end-to-end time, one line per stage, the objective dashed."""
    with _figure(10.5, 3.2, columns=3) as (figure, axes):
        names = {"ttft": "time to first token", "tpot": "time per output token", "e2e": "end to end"}
        for ax, (name, title) in zip(axes[0], names.items(), strict=True):
            for stage, colour in zip(run.stages, _colours(len(run.stages)), strict=True):
                ok = [r for r in run.results if r.is_ok and r.stage == stage.index]
                values = np.sort(latencies(ok, name)) * 1000
                if len(values):
                    shares = np.arange(1, len(values) + 1) / len(values)
                    label = stage.label if len(run.stages) > 1 else None
                    ax.step(values, shares, where="post", color=colour, lw=1.6, label=label)
            if (limit := run.scenario.slo.limits_ms.get(name)) is not None:
                ax.axvline(limit, color=_BAD, ls="--", lw=1, label="objective")
            ax.set(title=title, xlabel="ms", ylim=(0, 1.01))
            _readable_scale(ax.xaxis, [float(x) for line in ax.lines for x in line.get_xdata()])
            if ax.get_legend_handles_labels()[1]:
                ax.legend(fontsize=8)
        axes[0][0].set_ylabel("share of requests")
        return svg(figure)


def timeline(run: Run) -> str:
    """Over the run: arrivals and answers, tokens per second, TTFT, and the live changes as marks."""
    measured = [result for result in run.results if result.stage >= 0]
    edges = _bins(run)
    width_s = edges[1] - edges[0]
    with _figure(10.5, 6, rows=3) as (figure, axes):
        rate, tokens, ttft = (row[0] for row in axes)
        due, _ = np.histogram([r.due_s for r in measured], edges)
        good, _ = np.histogram([r.end_s for r in measured if r.is_ok], edges)
        bad, _ = np.histogram([r.end_s for r in measured if r.is_whole and not r.is_ok], edges)
        rate.stairs(due / width_s, edges, color=_INK, lw=1.4, label="arrived")
        rate.stairs(good / width_s, edges, color=_COLOURS[0], fill=True, alpha=0.35, label="answered")
        if bad.any():
            rate.stairs(bad / width_s, edges, color=_BAD, fill=True, label="failed")
        rate.set(ylabel="requests/s")
        rate.legend(fontsize=8, ncols=3, loc="upper left")
        made, _ = np.histogram(
            [r.end_s for r in measured if r.is_ok], edges, weights=[r.output_tokens for r in measured if r.is_ok]
        )
        tokens.stairs(made / width_s, edges, color=_COLOURS[2], fill=True, alpha=0.45)
        tokens.set(ylabel="output tokens/s")
        for adapter, colour in ((False, _COLOURS[1]), (True, _COLOURS[0])):
            points = [(r.due_s, r.ttft_s * 1000) for r in measured if r.ttft_s and bool(r.adapter) == adapter]
            if points:
                ttft.scatter(*zip(*points, strict=True), s=5, alpha=0.5, color=colour, lw=0,
                             rasterized=len(points) > 5000, label="adapter" if adapter else "base")  # fmt: skip
        _readable_scale(ttft.yaxis, [r.ttft_s * 1000 for r in measured if r.ttft_s])
        for change in run.changes:
            ttft.axvline(change.start_s, color=_COLOURS[3] if change.is_ok else _BAD, lw=0.8, alpha=0.6)
        ttft.set(ylabel="TTFT, ms", xlabel="seconds (by scheduled arrival)")
        for ax in (rate, tokens, ttft):
            ax.set_xlim(edges[0], edges[-1])
        return svg(figure)


def adapter_heat_map(run: Run) -> str:
    """p95 TTFT per adapter (busiest first) and time; a gap is a time without a request."""
    measured = [result for result in run.results if result.stage >= 0]
    by_adapter = group(measured, lambda r: r.adapter or BASE_NAME)
    names = sorted(by_adapter, key=lambda name: -len(by_adapter[name]))[:_MAX_ADAPTERS]
    edges = _bins(run)
    cells = np.full((len(names), len(edges) - 1), np.nan)
    for row, name in enumerate(names):
        for column, values in _by_bin(by_adapter[name], edges).items():
            cells[row, column] = np.quantile(values, 0.95) * 1000
    with _figure(10.5, max(1.6, 0.2 * len(names) + 1.0)) as (figure, axes):
        ax = axes[0][0]
        ax.grid(visible=False)
        finite = cells[np.isfinite(cells)]
        if finite.size:
            from matplotlib.colors import LogNorm

            low, high = max(0.1, float(finite.min())), max(0.2, float(finite.max()))
            norm = LogNorm(low, high if high > low else low * 1.01)
            mesh = ax.pcolormesh(edges, np.arange(len(names) + 1), cells, norm=norm, cmap="viridis", rasterized=True)
            bar = figure.colorbar(mesh, ax=ax, label="TTFT p95, ms", pad=0.01)
            _readable_scale(bar.ax.yaxis, [low, high])
        labels = [_plain(f"{name} ({len(by_adapter[name])})") for name in names]
        ax.set_yticks(np.arange(len(names)) + 0.5, labels, fontsize=7)
        ax.invert_yaxis()
        ax.set(xlabel="seconds (by scheduled arrival)")
        return svg(figure)


def slo_against_rate(run: Run, summary: Summary) -> str:
    """Attainment of the objective at every stage's rate (or clients), and how much it delivered."""
    stages = summary.stages
    closed = run.scenario.arrival is not None and run.scenario.arrival.is_closed
    loads = [float((s.concurrency if closed else s.rate) or f.requests / max(f.span_s, 1e-9)) for s, f in stages]
    with _figure(10.5, 3.2, columns=2) as (figure, axes):
        left, right = axes[0]
        left.plot(loads, [f.slo_attainment for _, f in stages], "o-", color=_COLOURS[0])
        left.axhline(run.scenario.slo.attainment, color=_BAD, ls="--", lw=1, label="wanted")
        left.set(ylim=(-0.02, 1.05), ylabel="share within the objective", title="SLO attainment")
        left.legend(fontsize=8)
        right.plot(loads, [f.goodput_rps for _, f in stages], "o-", color=_COLOURS[2], label="within the objective")
        right.plot(loads, [f.requests_per_s for _, f in stages], "o:", color=_INK, label="all answers")
        if not closed:
            right.plot([0, max(loads)], [0, max(loads)], color=_INK, lw=0.8, alpha=0.5, label="offered")
        right.set(ylabel="requests/s", title="goodput", ylim=(0, None))
        right.legend(fontsize=8)
        for ax in (left, right):
            ax.set(xlabel="clients" if closed else "requests/s offered", xlim=(0, max(loads) * 1.05))
        return svg(figure)


def _readable_scale(axis: Any, values: Sequence[float]) -> None:
    """Logarithmic where values differ more than tenfold, with numbers as people write them in either case."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    positive = [value for value in values if value > 0]
    if positive and max(positive) > 10 * min(positive):
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(positive) < 100 * min(positive) else (1,)))
    else:
        axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _bins(run: Run) -> Any:
    """Edges of equal time bins over the stages, of a round width, at most 60."""
    start = run.stages[0].start_s
    end = max(run.stages[-1].end_s, start + 1e-3)
    width = next((w for w in _NICE_S if (end - start) / w <= _MAX_BINS), (end - start) / _MAX_BINS)
    return start + width * np.arange(math.ceil((end - start) / width) + 1)


def _by_bin(results: Sequence[RequestResult], edges: Any) -> dict[int, list[float]]:
    bins: dict[int, list[float]] = {}
    for result in results:
        if result.ttft_s is not None and result.is_ok:
            place = int(np.searchsorted(edges, result.due_s, side="right")) - 1
            bins.setdefault(min(max(place, 0), len(edges) - 2), []).append(result.ttft_s)
    return bins


def _colours(count: int) -> list[Any]:
    if count <= len(_COLOURS):
        return list(_COLOURS[:count])
    from matplotlib import colormaps

    return list(colormaps["viridis"](np.linspace(0, 0.9, count)))


def _plain(text: str) -> str:
    """A name that matplotlib draws as it is: `$` would start mathematics."""
    return text.replace("$", r"\$")
