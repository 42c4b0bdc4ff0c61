"""`manylora usage`: what was used and stored, as a table, as CSV for a spreadsheet, or as JSON."""

import csv
import sys
from typing import Annotated, Any, Final

import typer

from manylora.cli.answers import USAGE, Remote, console, fail, in_bytes, print_json, server, table

_GROUPS: Final = ("day", "hour", "tenant", "adapter", "adapter_tenant")
_OUTCOMES: Final = ("ok", "cancelled", "invalid", "rejected", "error")
_SUMS: Final = (
    "prompt_tokens", "completion_tokens", "cached_tokens", "slot_seconds", "stored_bytes", "stored_byte_hours",
    "training_tokens", "training_seconds",
)  # fmt: skip


def register(program: typer.Typer) -> None:
    """Add `usage` to the program."""
    program.command()(usage)


def usage(
    start: Annotated[
        str | None, typer.Option("--from", metavar="TIME", help="2026-11-01 (midnight UTC) or 2026-11-01T10:15:00Z.")
    ] = None,
    end: Annotated[
        str | None, typer.Option("--to", metavar="TIME", help="The first moment that does not count; default: now.")
    ] = None,
    group_by: Annotated[str, typer.Option(help="Comma list of tenant, adapter, and day or hour.")] = "tenant,adapter",
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV for a spreadsheet.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for scripts.")] = False,
) -> None:
    """Requests, tokens, time in device slots and bytes stored: of your tenant; with an admin key, of all.

    Asks the server at MANYLORA_URL with the key in MANYLORA_KEY.
    """
    if as_csv and as_json:
        fail("Ask for --csv or for --json.", USAGE)
    asked = {"from": start, "to": end, "group_by": group_by}
    with server(as_json=as_json) as connection:
        answer = _all_pages(connection, {k: v for k, v in asked.items() if v is not None})
    if as_json:
        print_json(answer)
    elif as_csv:
        _write_csv(answer)
    else:
        _show(answer)


def _all_pages(connection: Remote, asked: dict[str, str]) -> dict[str, Any]:
    """The answer with the rows of every page; the total is the last page's."""
    rows: list[dict[str, Any]] = []
    answer = connection.call("GET", "/v1/usage", params=asked)
    while answer.get("has_more"):
        rows += answer["data"]
        answer = connection.call("GET", "/v1/usage", params={**asked, "after": answer["last_id"]})
    return {**answer, "data": [*rows, *answer["data"]]}


def _groups(answer: dict[str, Any]) -> list[str]:
    wanted = {*answer["group_by"], *(["adapter_tenant"] if "adapter" in answer["group_by"] else [])}
    return [name for name in _GROUPS if name in wanted]


def _write_csv(answer: dict[str, Any]) -> None:
    """A header and one record for each row; an empty adapter is the base."""
    groups = _groups(answer)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    money = ["cost"] if answer.get("prices") else []
    writer.writerow([*groups, "requests", *(f"requests_{name}" for name in _OUTCOMES), *_SUMS, *money])
    for row in answer["data"]:
        outcomes = [row["outcomes"].get(name, 0) for name in _OUTCOMES]
        writer.writerow(
            [
                *(row[name] for name in groups),
                row["requests"],
                *outcomes,
                *(row.get(name, 0) for name in (*_SUMS, *money)),
            ]
        )


def _show(answer: dict[str, Any]) -> None:
    groups = _groups(answer)
    prices = answer.get("prices")
    money = [prices["currency"]] if prices else []
    columns = [*groups, "requests", "ok", "prompt tokens", "completion tokens", "slot hours", "stored", *money]
    rows = [[_name(name, row[name]) for name in groups] + _cells(row) for row in answer["data"]]
    if groups:
        rows.append(["total", *[""] * (len(groups) - 1), *_cells(answer["total"])])
    console.print(table([name.replace("adapter_tenant", "of") for name in columns], rows))


def _name(column: str, name: str | None) -> str:
    if name is None:
        return "(base)" if column == "adapter" else ""
    return name


def _cells(row: dict[str, Any]) -> list[str]:
    counts = (row["requests"], row["outcomes"].get("ok", 0), row["prompt_tokens"], row["completion_tokens"])
    money = [f"{row['cost']:.2f}"] if "cost" in row else []
    return [*map(str, counts), f"{row['slot_seconds'] / 3600:.2f}", in_bytes(row["stored_bytes"]), *money]
