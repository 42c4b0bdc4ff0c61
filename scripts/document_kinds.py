"""Writes the table of kinds in docs/adapters.md from tests/peft_kinds.json: `make docs`.

`python scripts/document_kinds.py --try` first has the installed PEFT make an adapter of every kind (a minute).
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "adapters.md"
OUTCOMES = ROOT / "tests" / "peft_kinds.json"
START, END = "<!-- kinds: written by `make docs` -->", "<!-- end of kinds -->"


def table() -> str:
    """One row for each kind: PEFT's method, what it becomes, what that costs for a token and in memory."""
    found: dict[str, dict[str, Any]] = json.loads(OUTCOMES.read_text(encoding="utf-8"))
    served = sum(bool(each["becomes"]) for each in found.values())
    rows = [
        f"Of {len(found)} kinds, {served} are served.",
        "",
        "| kind | `peft_type` | served as | cost per token | memory per byte of its file |",
        "| --- | --- | --- | --- | --- |",
    ]
    usual = found["LoRA"]["per_token"]
    for name, each in found.items():
        cost = "—" if each["per_token"] is None else f"{each['per_token'] / usual:.2f}"
        becomes = each["becomes"] or "refused"
        rows.append(f"| {name} | `{each['method']}` | {becomes} | {cost} | {each['memory'] or '—'} |")
    return "\n".join(rows)


def with_table(page: str) -> str:
    """The page with its table replaced by the current one."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


def try_again() -> None:
    """Write what the server makes of every kind into the table's data."""
    sys.path[:0] = [str(ROOT / "server"), str(ROOT)]
    from manylora.errors import InvalidAdapter
    from manylora.lora.format.reader import read
    from tests.engine.harness import build_rig, load
    from tests.peft_kinds import KINDS, make_kind, outcome_of, tensors_of
    from tests.tiny_models import make_tiny_model

    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = make_tiny_model("llama", Path(scratch) / "base")
        rig = build_rig(load(base))
        rig.close()
        for number, name in enumerate(KINDS):
            folder = make_kind(base, Path(scratch) / str(number), name, seed=number)
            size = sum(view.num_bytes for view in tensors_of(folder).values())
            try:
                adapter = read(folder, rig.wrapped.modules, max_rank=64, max_size=2**24)
            except InvalidAdapter:
                adapter = None
            found[name] = outcome_of(name, adapter, size)
    OUTCOMES.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if "--try" in sys.argv:
        try_again()
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
