"""The command line's way to a server: one request, its answer or an exit code, tables for people, JSON for scripts.

Exit codes: 0 done · 1 the server failed · 2 wrong usage or request · 3 the adapter was refused · 4 there is no such
adapter · 5 the key is wrong or may not do this · 6 the state does not allow it · 7 a quota is used up or the server
is busy, come back later · 8 the server cannot be reached · 9 nothing was promoted, since it was not better.
"""

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Any, Final, NoReturn

import orjson
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from manylora.client.adapters import Publication
from manylora.client.jobs import follow
from manylora.client.server import BrokenOff, Refused, Server, Unreachable, connect
from manylora.errors import InvalidRequest

FAILED, USAGE, REFUSED, NOT_FOUND, DENIED, CONFLICT, LATER, UNREACHABLE, NOT_PROMOTED = range(1, 10)
_DEFAULT_URL: Final = "http://127.0.0.1:8000"
_EXIT_CODES: Final = {400: USAGE, 401: DENIED, 403: DENIED, 404: NOT_FOUND, 405: USAGE, 409: CONFLICT, 413: REFUSED,
                      422: REFUSED, 429: LATER, 503: LATER}  # fmt: skip

# A table that goes into a file or a pipe has no width to keep to.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 240)
complaints = Console(stderr=True, highlight=False)


class Remote:
    """Requests to one server; everything but a success ends the program."""

    def __init__(self, server: Server, *, as_json: bool) -> None:
        self._server = server
        self._as_json = as_json

    def call(self, method: str, path: str, **request: Any) -> Any:
        """The answer's JSON, None for an empty one."""
        try:
            return self._server.call(method, path, **request)
        except Unreachable as error:
            self._end_unreachable(error)
        except Refused as refused:
            self._end(refused)

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a stream."""
        try:
            yield from self._server.events(path, body)
        except Unreachable as error:
            self._end_unreachable(error)
        except Refused as refused:
            self._end(refused)
        except BrokenOff as error:
            fail(error.message, FAILED)

    def follow(self, job_id: str, tell: Callable[[dict[str, Any], dict[str, Any]], None]) -> dict[str, Any]:
        """A fine-tuning job when it has ended; `tell` is called with it and each of its events."""
        try:
            return follow(self._server, job_id, tell)
        except Unreachable as error:
            self._end_unreachable(error)
        except Refused as refused:
            self._end(refused)

    def _end_unreachable(self, error: Unreachable) -> NoReturn:
        fail(f"{error.message} Is MANYLORA_URL right?", UNREACHABLE)

    def _end(self, refused: Refused) -> NoReturn:
        code = _EXIT_CODES.get(refused.answered, FAILED)
        if refused.error is None:
            fail(f"The server answered {refused.answered} without an explanation. Is MANYLORA_URL right?", code)
        if self._as_json:
            print_json({"error": refused.error})
            raise typer.Exit(code)
        problems = refused.error.get("problems", [])
        show_problems(problems)
        if problems:  # of which the message has the first one
            fail(f"The adapter was refused: {len(problems)} problem{'s' * (len(problems) > 1)}, above.", code)
        later = "" if refused.retry_after is None else f" (Retry-After: {refused.retry_after} s)"
        fail(f"{refused.error['message']}{refused.advice}{later}", code)


@contextmanager
def server(*, as_json: bool) -> Iterator[Remote]:
    """The server at MANYLORA_URL, with the key in MANYLORA_KEY."""
    with ExitStack() as stack:
        try:
            address = os.environ.get("MANYLORA_URL") or _DEFAULT_URL
            found = stack.enter_context(connect(address, os.environ.get("MANYLORA_KEY", "")))
        except InvalidRequest as error:
            fail(error.message.replace("`server`", "MANYLORA_URL"), USAGE)
        yield Remote(found, as_json=as_json)


def next_steps(done: Publication, address: str = "", tenant: str | None = None) -> list[str]:
    """What an uploaded version that is not active leaves to do, as lines; `address` is that of the server, if given."""
    if done.is_active:
        return []
    manylora = program_at(address)
    of_tenant = "" if tenant is None else f" --tenant {shlex.quote(tenant)}"
    lines = [f"{done.answering or 'No version'} answers to the name {done.name} now."]
    if done.answering is not None and tenant is None:
        lines.append(f'  compare: {manylora} ask {done.answering} --compare {done.label} "…"')
    return [*lines, f"  promote: {manylora} adapters promote {done.label}{of_tenant}"]


def program_at(address: str) -> str:
    """How `manylora` is typed so that it asks the server there, which is the known one where `address` is empty."""
    known = os.environ.get("MANYLORA_URL") or _DEFAULT_URL
    is_known = address.rstrip("/") in ("", known.rstrip("/"))
    return "manylora" if is_known else f"MANYLORA_URL={shlex.quote(address)} manylora"


def fail(message: str, code: int) -> NoReturn:
    """One line on standard error, then the exit code."""
    complaints.print("error:", message, style="red", markup=False, soft_wrap=True)
    raise typer.Exit(code)


def print_json(value: Any) -> None:
    """For scripts: one indented JSON document on standard output."""
    sys.stdout.write(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode() + "\n")


def write_text(text: str) -> None:
    """Text of a model or a stranger, at once; without control characters to a terminal, which would obey them."""
    if sys.stdout.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
    sys.stdout.write(text)
    sys.stdout.flush()


def show_problems(problems: list[Mapping[str, str]]) -> None:
    """What is wrong with an adapter, on standard error, one paragraph each."""
    for problem in problems:
        complaints.print(_plain(f"{problem['code']}: {problem['where']}"), style="bold", soft_wrap=True)
        complaints.print(_plain(f"    {problem['message']}"), soft_wrap=True)


def table(columns: list[str], rows: list[list[str]]) -> Table:
    """A plain table. Cells are text, never markup: names and messages come from elsewhere."""
    shown = Table(box=None, header_style="bold", pad_edge=False, show_header=any(columns))
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*(_plain(cell) for cell in row))
    return shown


def _plain(text: str) -> Text:
    return Text("".join(c if c.isprintable() else "�" for c in text))


def in_bytes(size: int) -> str:
    """1536 as `1.5 KiB`."""
    value, units = float(size), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    while value >= 1024 and unit != "GiB":
        value, unit = value / 1024, next(units)
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def as_time(seconds: int | None) -> str:
    """A Unix time in this machine's time zone."""
    if seconds is None:
        return "never"
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M")
