"""What the lifecycle's commands share: errors as one line, a bar for progress, a gentle Ctrl-C."""

import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich.console import Console

from manylora.errors import InvalidAdapter, InvalidRequest, ManyloraError

if TYPE_CHECKING:
    from manylora.lifecycle.progress import Progress

_T = TypeVar("_T", bound=str)
console = Console(stderr=True)


def one_of(flag: str, value: str, allowed: tuple[_T, ...]) -> _T:
    for known in allowed:
        if value == known:
            return known
    raise InvalidRequest(f"{flag} must be one of {', '.join(allowed)}, not {value!r}.")


def names_of(text: str) -> tuple[str, ...]:
    """`a, b` as ("a", "b")."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def numbers_of(flag: str, text: str) -> tuple[int, ...]:
    """`1,2` as (1, 2). Raises InvalidRequest."""
    try:
        return tuple(int(part) for part in names_of(text))
    except ValueError as error:
        raise InvalidRequest(f"{flag} must be whole numbers with commas between, not {text!r}.") from error


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
def errors() -> Iterator[None]:
    """A refusal or a failure is one line on stderr and exit code 1."""
    try:
        yield
    except ManyloraError as error:
        console.print("error:", error.message, style="red", markup=False, highlight=False, soft_wrap=True)
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
def progress() -> Iterator[Callable[["Progress"], None]]:
    """A bar with the newest figures; messages and warnings above it."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Bar(*columns, console=console) as bar:
        tasks: dict[str, int] = {}

        def listen(event: "Progress") -> None:
            if event.message:
                bar.console.print(event.message, style="yellow" if event.stage == "warning" else None, markup=False)
            if not event.total:
                return
            if event.stage not in tasks:
                tasks[event.stage] = bar.add_task(event.stage, total=event.total, figures="")
            task = tasks[event.stage]
            bar.update(bar.task_ids[task], completed=event.done, total=event.total, figures=_figures(event.values))

        yield listen


def _figures(values: dict[str, float]) -> str:
    from manylora.lifecycle.pace import in_words

    parts = [f"{name} {value:.4f}" for name, value in values.items() if name != "remaining_s"]
    if "remaining_s" in values:
        parts.append(f"about {in_words(values['remaining_s'])} left")
    return "  ".join(parts)
