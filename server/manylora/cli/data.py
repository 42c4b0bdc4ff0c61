"""`manylora data check`: what is to be known of rows before anything learns from them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from manylora.cli.answers import FAILED, USAGE, console, fail, print_json, table

__all__ = ["register"]

app = typer.Typer(no_args_is_help=True, help="Look at files of rows before anything learns from them.")


def register(program: typer.Typer) -> None:
    """Add `data` to the program."""
    program.add_typer(app, name="data")


@app.callback()
def _data() -> None:
    """Commands about data."""


@app.command()
def check(
    data: Annotated[Path, typer.Argument(help="Rows: .jsonl, .json, .csv, .tsv or .parquet, or a folder of them.")],
    held_out: Annotated[Path | None, typer.Option("--eval", help="Held-out rows: also what both files share.")] = None,
    columns: Annotated[
        list[str] | None, typer.Option("--map", help="A field by its name in the file, such as prompt=question.")
    ] = None,
    encoding: Annotated[str, typer.Option(help="The encoding of text files, such as gb18030.")] = "utf-8",
    as_json: Annotated[bool, typer.Option("--json", help="JSON for scripts instead of tables.")] = False,
) -> None:
    """Rows that can be learnt from and those that cannot, by number; repeats, lengths, labels, what is personal.

    Needs no model and no server. Exit code 1 where a row cannot be learnt from: training refuses such a file.
    """
    from manylora.errors import InvalidRequest
    from manylora.lifecycle.data.files import Reading
    from manylora.lifecycle.data.report import report_of
    from manylora.lifecycle.parameters import renamed

    names = {"columns": "--map", "encoding": "--encoding"}
    try:
        reading = Reading(encoding=encoding, columns=tuple(columns or ()))
        report, rows = report_of(data, reading=reading)
        reports = [report]
        if held_out is not None:
            reports.append(report_of(held_out, reading=reading, learnt=rows)[0])
    except InvalidRequest as error:
        fail(renamed(error.message, names), USAGE)
    if as_json:
        print_json([report.as_dict() for report in reports])
    else:
        for report in reports:
            _show(report.as_dict())
    if any(report.refused.count for report in reports):
        raise typer.Exit(FAILED)


def _show(found: dict[str, Any]) -> None:
    rows, lengths = found["rows"], found["lengths"]
    console.print(f"{found['file']}: {rows['used']} {found['shape']} rows", markup=False, style="bold")
    told = [
        ["cannot be learnt from", *_named(rows["refused"])],
        ["repeat earlier ones", *_named(found["repeated"])],
        ["want another answer to the same question", *_named(found["contrary"])],
        ["ask nothing", *_named(found["empty"])],
        *([["are learnt from, too", *_named(found["shared"])]] if found["shared"] is not None else []),
        *([f"may have a person's data: {kind}", *_named(rows)] for kind, rows in found["personal"].items()),
    ]
    console.print(table(["rows that", "", "which"], told))
    for fault in found["faults"]:
        console.print(fault, markup=False, style="yellow")
    if lengths:
        text = (
            f"characters: median {lengths['median']}, 95% {lengths['p95']}, longest {lengths['longest']} "
            f"(row {lengths['longest_row']}); answers: median {lengths['answer_median']}, "
            f"longest {lengths['answer_longest']}"
        )
        console.print(text, markup=False)
    if found["label_counts"]:
        counts = ", ".join(f"{label} {count}" for label, count in found["label_counts"].items())
        more = found["labels"]["count"] - len(found["label_counts"])
        console.print(f"labels: {counts}{f' and {more} more' if more else ''}", markup=False)


def _named(found: dict[str, Any]) -> tuple[str, str]:
    numbers = ", ".join(map(str, found["rows"]))
    return str(found["count"]), numbers + (", …" if found["count"] > len(found["rows"]) else "")
