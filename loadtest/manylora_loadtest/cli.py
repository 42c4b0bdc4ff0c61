"""The command: `python -m manylora_loadtest`, or `manylora-loadtest` once installed.

Exit codes: 0 passed (or no thresholds), 1 a threshold failed, 2 the run could not be done.
"""

import asyncio
import importlib
import shlex
import sys
from collections.abc import Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from manylora.packages import install_command
from manylora_loadtest.errors import LoadTestError, ScenarioError
from manylora_loadtest.live import LiveView
from manylora_loadtest.record import read_run, write_run
from manylora_loadtest.report import write_report
from manylora_loadtest.results import LEFT, OK, REFUSED
from manylora_loadtest.runner import Run, run_scenario
from manylora_loadtest.scenario import Scenario, TraceSource, find_scenario, load_scenario, ready_scenarios
from manylora_loadtest.summary import Summary, summarise
from manylora_loadtest.trace import trace_lines

app = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
T = TypeVar("T")

Url = Annotated[str, typer.Option(help="The server, with or without /v1.")]
Key = Annotated[str | None, typer.Option(envvar="MANYLORA_API_KEY", help="For tenants without a key of their own.")]
MetricsKey = Annotated[str | None, typer.Option(help="For /metrics, where that needs another key.")]
Out = Annotated[Path | None, typer.Option(help="Folder for results.jsonl and report.html; made if missing.")]
Report = Annotated[bool, typer.Option(help="Draw report.html beside the results.")]
Pid = Annotated[int | None, typer.Option(help="The server's process on this machine: watch its memory and files.")]
Live = Annotated[bool, typer.Option(help="Show the run while it goes on.")]
DEFAULT_URL = "http://127.0.0.1:8000"


@app.command()
def run(
    scenario: Annotated[str, typer.Argument(help="A TOML file, or the name of a ready one (see `list`).")],
    url: Url = DEFAULT_URL,
    key: Key = None,
    metrics_key: MetricsKey = None,
    out: Out = None,
    live: Live = True,
    report: Report = True,
    seed: Annotated[int | None, typer.Option(help="Instead of the scenario's.")] = None,
    rate: Annotated[str | None, typer.Option(help="Requests per second, `2` or a sweep `1,2,4`.")] = None,
    concurrency: Annotated[str | None, typer.Option(help="Clients of a closed loop, `8` or a sweep `1,8,32`.")] = None,
    duration_s: Annotated[float | None, typer.Option(help="Of each stage.")] = None,
    requests: Annotated[int | None, typer.Option(help="In each stage.")] = None,
    watch_pid: Pid = None,
) -> None:
    """Run a scenario against a server; the exit code says whether its thresholds held."""
    loaded = load_scenario(find_scenario(scenario))
    changed = {"rate": _numbers(rate), "concurrency": _numbers(concurrency), "duration_s": duration_s}
    loaded = _with_arrival(loaded, {**changed, "requests": requests})
    if seed is not None:
        loaded = loaded.model_copy(update={"seed": seed})
    _run(loaded, url, key, metrics_key, out, live, report, watch_pid)


@app.command()
def replay(
    trace: Annotated[Path, typer.Argument(help="JSON lines with t, adapter, prompt_tokens, output_tokens.")],
    url: Url = DEFAULT_URL,
    key: Key = None,
    metrics_key: MetricsKey = None,
    out: Out = None,
    live: Live = True,
    report: Report = True,
    speed: Annotated[float, typer.Option(help="2 replays in half the time.")] = 1.0,
    scenario: Annotated[str | None, typer.Option(help="Objective, thresholds and tenants from this one.")] = None,
    watch_pid: Pid = None,
) -> None:
    """Replay a trace file against a server."""
    source = TraceSource(path=trace, speed=speed)
    if scenario is None:
        loaded = Scenario(name=trace.stem, trace=source)
    else:
        loaded = load_scenario(find_scenario(scenario)).model_copy(update={"arrival": None, "trace": source})
    _run(loaded, url, key, metrics_key, out, live, report, watch_pid)


@app.command("report")
def draw_report(
    results: Annotated[Path, typer.Argument(help="results.jsonl of a run.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file; beside the results if left out.")] = None,
) -> None:
    """Draw the report of an earlier run again."""
    _check_drawing("the report needs {}")
    finished = read_run(results)
    path = out or results.with_name("report.html")
    write_report(path, finished, summarise(finished))
    Console().print(f"wrote {escape(str(path))}")


@app.command()
def trace(
    results: Annotated[Path, typer.Argument(help="results.jsonl of a run.")],
    out: Annotated[Path, typer.Argument(help="The trace file to write.")],
) -> None:
    """Turn a run's requests into a trace file that `replay` takes."""
    with out.open("wb") as file:
        file.writelines(trace_lines(result for result in read_run(results).results if result.stage >= 0))


@app.command("list")
def list_scenarios() -> None:
    """Show the scenarios that come with the package."""
    table = Table(box=None, padding=(0, 2))
    table.add_column("name", style="bold")
    table.add_column("what it asks")
    for name, path in ready_scenarios().items():
        table.add_row(name, load_scenario(path).description)
    Console().print(table)


@app.command()
def overhead(
    concurrency: Annotated[int, typer.Option()] = 32,
    requests: Annotated[int, typer.Option(help="Per measurement.")] = 512,
) -> None:
    """Measure what this load test costs itself, against a trivial server on this machine."""
    from manylora_loadtest.overhead import measure_overhead

    result = _asyncio_run(measure_overhead(concurrency, requests))
    table = Table(
        "events per answer", "requests/s", "events/s", "client CPU", "CPU per request", box=None, padding=(0, 2)
    )
    for row in result.rows:
        table.add_row(
            str(row.events), f"{row.requests_per_s:,.0f}", f"{row.requests_per_s * row.events:,.0f}",
            f"{row.cpu_share:.0%} of a core", f"{row.cpu_s_per_request * 1e6:,.0f} µs",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(
        f"about {result.cpu_s_per_request * 1e6:.0f} µs a request and {result.cpu_s_per_event * 1e6:.1f} µs an event"
    )


@app.command()
def fleet(
    model: Annotated[Path, typer.Argument(help="The base model's folder (Hugging Face layout, safetensors).")],
    out: Annotated[Path, typer.Argument(help="Folder to fill with one adapter folder each.")],
    count: Annotated[int, typer.Option()] = 32,
    ranks: Annotated[str, typer.Option(help="Taken in turn.")] = "16",
    pattern: Annotated[str, typer.Option(help="Of the adapters' names.")] = "a{:03d}",
    seed: Annotated[int, typer.Option()] = 1,
) -> None:
    """Make random adapters in PEFT layout to load a server with. Each changes the base's answers."""
    from manylora_loadtest.fleet import make_fleet

    made = make_fleet(model, out, count, [int(rank) for rank in ranks.split(",")], pattern=pattern, seed=seed)
    Console().print(f"made {len(made)} adapters in {escape(str(out))}")


def _run(
    scenario: Scenario, url: str, key: str | None, metrics_key: str | None, out: Path | None, live: bool, report: bool,
    pid: int | None,
) -> None:  # fmt: skip
    if report:
        _check_drawing("the report needs {}, or leave it out with --no-report")
    console = Console()
    watch = LiveView(scenario, console).watch if live else None
    finished = _asyncio_run(run_scenario(scenario, url, key=key, metrics_key=metrics_key, watch=watch, pid=pid))
    summary = summarise(finished)
    folder = out or Path("loadtest-results") / f"{scenario.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True, exist_ok=True)
    write_run(folder / "results.jsonl", finished, summary)
    if report:
        _draw(folder, finished, summary)
    _show(console, finished, summary)
    console.print(f"results are in {escape(str(folder))}", highlight=False)
    if not summary.is_passed:
        raise typer.Exit(1)


def _check_drawing(needs: str) -> None:
    """Raises LoadTestError before the work, where its report could not be drawn after it."""
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise LoadTestError(needs.format(f"matplotlib ({install_command('matplotlib')})")) from error


def _draw(folder: Path, finished: Run, summary: Summary) -> None:
    """Draw the report of results that are written. What goes wrong is said, and costs nobody the results."""
    try:
        write_report(folder / "report.html", finished, summary)
    except Exception as error:  # noqa: BLE001 - a drawing library raises anything
        said = " ".join(str(error).split())[:200] or type(error).__name__
        again = f"draw it again with: manylora-loadtest report {shlex.quote(str(folder / 'results.jsonl'))}"
        Console(stderr=True).print(escape(f"The report could not be drawn: {said}. {again}"), style="yellow")


def _show(console: Console, run: Run, summary: Summary) -> None:
    table = Table(box=None, padding=(0, 1))
    table.add_column("", no_wrap=True)
    for column in ("sent", "failed", "tokens/s", "TTFT p50/95/99 ms", "TPOT p50/95 ms", "in SLO"):
        table.add_column(column, justify="right", no_wrap=True)
    rows = [(stage.label, figures) for stage, figures in summary.stages]
    rows += [(name, figures) for name, figures in summary.tenants.items() if len(summary.tenants) > 1]
    for label, figures in rows:
        table.add_row(
            escape(label), str(figures.requests), str(figures.requests - figures.ok),
            f"{figures.output_tokens_per_s:,.1f}", _times(figures.latency_s["ttft"], "p50", "p95", "p99"),
            _times(figures.latency_s["tpot"], "p50", "p95"), f"{figures.slo_attainment:.1%}",
        )  # fmt: skip
    console.print(table)
    for outcome, count in summary.totals.outcomes.items():
        if outcome in (LEFT, REFUSED):
            console.print(f"{count} × {outcome}, as wanted", highlight=False)
        elif outcome != OK:
            example = next(result.error for result in run.results if result.outcome == outcome)
            console.print(f"[red]{count} × {escape(outcome)}[/]: {escape(example)}", highlight=False)
    for change in run.changes:
        if not change.is_ok:
            console.print(f"[red]{change.kind} {escape(change.adapter)}[/]: {escape(change.error)}", highlight=False)
    if summary.counter_mismatches:
        console.print(f"[red]the server counted {summary.counters}, sent and answered were {summary.totals}[/]")
    if summary.usage_mismatches:
        console.print(f"[red]the server charges for {summary.usage}, sent and answered were {summary.totals}[/]")
    for threshold in summary.thresholds:
        verdict = "[green]passed[/]" if threshold.is_passed else "[red]failed[/]"
        actual = "not measured" if threshold.actual is None else f"{threshold.actual:,.4g}"
        sign = "≤" if threshold.is_upper else "≥"
        console.print(f"{verdict}  {threshold.name} {actual} ({sign} {threshold.limit:,.4g})", highlight=False)


def _times(values: dict[str, float], *names: str) -> str:
    return "/".join(f"{values[name] * 1000:,.0f}" for name in names) if values else "–"


def _with_arrival(scenario: Scenario, changes: dict[str, Any]) -> Scenario:
    changes = {name: value for name, value in changes.items() if value is not None}
    if not changes:
        return scenario
    if scenario.arrival is None:
        raise ScenarioError("this scenario replays a trace; its arrivals cannot be changed")
    try:
        arrival = type(scenario.arrival).model_validate({**scenario.arrival.model_dump(exclude_unset=True), **changes})
    except ValueError as error:
        raise ScenarioError(f"these arrivals do not work: {error}") from error
    return scenario.model_copy(update={"arrival": arrival})


def _numbers(text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ScenarioError(f"{text!r} is not a number or a comma list of numbers") from None


def _asyncio_run(work: Coroutine[Any, Any, T]) -> T:
    """On uvloop where it exists: it halves what the client takes from the cores it shares with the server."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.run(work)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(work)


def main() -> None:
    """The entry point of `manylora-loadtest`."""
    try:
        app()
    except LoadTestError as error:
        Console(stderr=True).print(f"[red]{escape(str(error))}[/]", highlight=False)
        sys.exit(2)
