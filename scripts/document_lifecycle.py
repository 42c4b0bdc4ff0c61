"""Writes the tables of flags of docs/lifecycle.md from the commands themselves: `make docs`."""

import re
from pathlib import Path
from typing import Any

import typer

from manylora.cli.main import build

PAGE = Path(__file__).parent.parent / "docs" / "lifecycle.md"
COMMANDS = ("train", "evaluate", "choose-rank", "extract", "compress", "merge", "inspect")
START, END = "<!-- flags of {}: written by `make docs` -->", "<!-- end of flags -->"


def table(command: str) -> str:
    """One row for each argument and flag of a command: its spelling, default and meaning."""
    program: Any = typer.main.get_command(build())
    rows = ["| flag | default | meaning |", "| --- | --- | --- |"]
    for param in program.commands[command].params:
        if param.name == "help":
            continue
        is_argument = param.param_type_name == "argument"
        flag = str(param.name).upper() if is_argument else " ".join(param.opts)
        default = "required" if param.required else shown(param)
        meaning = re.sub(r"\s+", " ", getattr(param, "help", "") or "").replace("|", r"\|")
        if param.multiple:
            meaning += "; may be given several times"
        if param.envvar:
            meaning += f" (or in `{param.envvar}`)"
        rows.append(f"| `{flag}` | {default} | {meaning} |")
    return "\n".join(rows)


def shown(param: Any) -> str:
    default = param.default
    if default in (None, "", ()) or default is False or (default is not None and callable(default)):
        return ""
    return f"`{default}`"


def with_tables(page: str) -> str:
    """The page with its tables replaced by the current ones."""
    for command in COMMANDS:
        start = START.format(command)
        before, _, rest = page.partition(start)
        _, _, after = rest.partition(END)
        page = f"{before}{start}\n{table(command)}\n{END}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
