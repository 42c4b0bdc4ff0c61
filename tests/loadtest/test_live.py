"""What a person sees in the terminal while a load runs."""

import asyncio
import io

import pytest
from rich.console import Console

from manylora_loadtest import live
from manylora_loadtest.live import LiveView
from manylora_loadtest.runner import Progress, run_scenario
from tests.loadtest.conftest import Serve, scenario
from tests.loadtest.fake_server import FakeServer

ADAPTERS = ("[bold]odd[/]", "plain")


def progress_of(serve: Serve, fake: FakeServer) -> Progress:
    """The progress of a whole run, as the view had it at the end."""
    seen: list[Progress] = []

    async def watch(progress: Progress) -> None:
        seen.append(progress)
        await asyncio.Event().wait()

    loaded = scenario(adapters={"discover": True, "popularity": {"kind": "round_robin"}})
    asyncio.run(run_scenario(loaded, serve(fake), watch=watch))
    (progress,) = seen
    progress.now_s = max(result.end_s for result in progress.results)
    return progress


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_has_rates_latencies_and_the_busiest_adapters(serve: Serve) -> None:
    progress = progress_of(serve, FakeServer(adapters=ADAPTERS, fail_every=10))
    console = Console(file=io.StringIO(), width=120)
    console.print(LiveView(scenario(), console).table(progress))
    text = written(console)
    assert "2 failed" in text
    assert "0 in flight" in text
    for row in ("TTFT", "TPOT", "E2E"):
        assert row in text
    for name in ADAPTERS:  # names come from strangers: no markup of theirs is obeyed
        assert name in text


def test_where_there_is_no_terminal_plain_lines_are_written(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_LINE_EVERY_S", 0.05)
    console = Console(file=io.StringIO(), width=160)
    loaded = scenario(arrival={"process": "constant", "rate": 20, "duration_s": 0.5})
    asyncio.run(run_scenario(loaded, serve(FakeServer()), watch=LiveView(loaded, console).watch))
    lines = written(console).splitlines()
    assert len(lines) > 1
    assert all("in flight" in line and "\x1b" not in line for line in lines)
