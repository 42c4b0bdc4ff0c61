"""What a long preparation shows: one bar per stage on a terminal, one line per stage elsewhere."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

__all__ = ["Stages", "quiet"]

Advance = Callable[[int], None]


class Stages:
    """`with Stages() as stages: with stages.step("Unpacking", size_bytes) as at: at(bytes_done)`, on standard error."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stderr)  # the stream of now, whoever redirects it later
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            _Size(),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False)

    @contextmanager
    def step(self, title: str, size_bytes: int | None = None) -> Iterator[Advance]:
        """One stage. Yields a function that is told how many bytes are done so far, where they can be counted."""
        if self._progress.disable:
            self.say(f"{title} …")
        task = self._progress.add_task(title, total=size_bytes)
        yield lambda done: self._progress.update(task, completed=done)
        self._progress.update(task, total=size_bytes or 1, completed=size_bytes or 1)


class _Size(DownloadColumn):
    """Bytes, for stages that count them."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total and task.total > 1 else Text("")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the bars of transformers, some of which have no switch, out of ours. Its log messages still come."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
