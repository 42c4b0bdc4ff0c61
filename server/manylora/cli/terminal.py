"""What the lifecycle's commands share: errors as one line, a bar for progress, a gentle Ctrl-C."""

import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias

import typer
from rich.console import Console

from manylora.errors import InvalidAdapter, ManyloraError

if TYPE_CHECKING:
    from manylora.lifecycle.progress import Progress

console = Console(stderr=True)
# How a message calls parameters; see `flags.Flags.rendered`.
Rendered: TypeAlias = "Callable[[str], str]"
INTERRUPTED = 130
_EVERY_S = 10.0
_BLOCKS = "▁▂▃▄▅▆▇█"


def command() -> str:
    """The command as it can be typed again, without this machine's way of starting the program, and without a key.

    It goes into cards and reports, which are published.
    """
    return shlex.join(["manylora", *_without_key(sys.argv[1:])])


def _without_key(words: list[str]) -> Iterator[str]:
    is_key = False
    for word in words:
        if not is_key and word != "--key" and not word.startswith("--key="):
            yield word
        is_key = word == "--key" and not is_key


@contextmanager
def errors(rendered: Rendered = str) -> Iterator[None]:
    """A refusal or a failure is one line on stderr and exit code 1; so is an interruption, with code 130."""
    try:
        yield
    except KeyboardInterrupt as error:
        console.print("interrupted", style="red")
        raise typer.Exit(INTERRUPTED) from error
    except ManyloraError as error:
        console.print("error:", rendered(error.message), style="red", markup=False, highlight=False, soft_wrap=True)
        if isinstance(error, InvalidAdapter):
            for problem in error.problems:
                console.print(f"  {problem.where}: {problem.message}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C or SIGTERM asks the work to stop at a good place; the second ends it."""
    asked: list[int] = []

    def ask(number: int, _: FrameType | None) -> None:
        asked.append(number)
        signal.signal(number, previous[number])
        console.print("stopping after this step; once more to stop at once")

    previous: dict[int, Any] = {int(n): signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def progress(rendered: Rendered = str) -> Iterator[Callable[["Progress"], None]]:
    """Messages and warnings as lines; a bar with the newest figures on a terminal, a line now and then elsewhere."""
    if not console.is_terminal:
        yield _Lines(rendered)
        return
    bars = _Bars(rendered)
    try:
        yield bars
    finally:
        bars.stop()


def _say(event: "Progress", rendered: Rendered) -> None:
    style = "yellow" if event.stage == "warning" else None
    console.print(rendered(event.message), style=style, markup=False, highlight=False, soft_wrap=True)


class _Bars:
    """One bar for each stage, from the stage's first event on."""

    def __init__(self, rendered: Rendered) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}"), console=console,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}
        self._losses: list[float] = []
        self._rendered = rendered

    def __call__(self, event: "Progress") -> None:
        if event.message:
            _say(event, self._rendered)
        if not event.total:
            return
        if event.stage not in self._tasks:
            self._bar.start()
            self._tasks[event.stage] = self._bar.add_task(event.stage, total=event.total, figures="")
        if "loss" in event.values:
            self._losses.append(event.values["loss"])
        curve = sparkline(self._losses) if "loss" in event.values else ""
        self._bar.update(
            self._tasks[event.stage], completed=event.done, total=event.total,
            figures=f"{curve}  {_figures(event.values)}".strip(),
        )  # fmt: skip

    def stop(self) -> None:
        if self._tasks:
            self._bar.stop()


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """A curve of one line, from the first value to the last; each of at most `width` places is the mean of its part."""
    places = min(width, len(values))
    parts = [values[len(values) * i // places : len(values) * (i + 1) // places] for i in range(places)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means, default=0.0), max(means, default=0.0)
    steps = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round((mean - low) / (high - low) * steps) if high > low else 0] for mean in means)


class _Lines:
    """For logs: a line when a stage ends, and at least every few seconds in between."""

    def __init__(self, rendered: Rendered) -> None:
        self._stage, self._last = "", time.monotonic()
        self._rendered = rendered

    def __call__(self, event: "Progress") -> None:
        if event.message:
            _say(event, self._rendered)
        now = time.monotonic()
        if event.stage != self._stage:
            self._stage, self._last = event.stage, now
        if event.total and (event.done == event.total or now - self._last > _EVERY_S):
            self._last = now
            line = f"{event.stage} {event.done}/{event.total}  {_figures(event.values)}".rstrip()
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _figures(values: dict[str, float]) -> str:
    from manylora.lifecycle.progress import in_words

    parts = [f"{name} {value:.4f}" for name, value in values.items() if name != "remaining_s"]
    if values.get("remaining_s"):
        parts.append(f"about {in_words(values['remaining_s'])} left")
    return "  ".join(parts)
