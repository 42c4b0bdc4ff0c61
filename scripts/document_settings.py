"""Writes the tables of docs/configuration.md from the settings themselves: `make docs`."""

import re
from pathlib import Path

from manylora.cli.serve import flag_of, shown_default
from manylora.settings import ENV_PREFIX, Settings

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
START, END = "<!-- settings: written by `make docs` -->", "<!-- end of settings -->"


def table() -> str:
    """One row for each setting: flag, variable, default, meaning."""
    rows = ["| flag, key | environment | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        flag = "`MODEL`" if name == "model" else f"`{flag_of(name)}`"
        keys = f"{flag} `{name}`" if name != "model" else f"{flag} `model`"
        default = f"`{shown}`" if (shown := shown_default(field)) else ""
        meaning = re.sub(r"\s+", " ", field.description or "").replace("|", r"\|")
        rows.append(f"| {keys} | `{ENV_PREFIX}{name.upper()}` | {default} | {meaning} |")
    return "\n".join(rows)


def with_table(page: str) -> str:
    """The page with its table replaced by the current one."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
