"""Writes the table of docs/models.md from tests/models/zoo.json: `make docs`.

`python scripts/document_models.py --try` first tries every type anew with the installed transformers (minutes), and
`--try TYPE …` some of them; `vision:TYPE` is the model of images and text of a type.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
OUTCOMES = ROOT / "tests" / "models" / "zoo.json"
START, END = "<!-- models: written by `make docs` -->", "<!-- end of models -->"


def table() -> str:
    """One row for each model type: its class, what the server makes of it, and why."""
    found = json.loads(OUTCOMES.read_text(encoding="utf-8"))
    types: dict[str, dict[str, str]] = found["types"]
    served = sum(each["outcome"] == "served" for each in types.values())
    vision: dict[str, dict[str, str]] = found["vision"]
    seen = sum(each["outcome"] == "served" for each in vision.values())
    return "\n".join(
        [
            f"Of the {len(types)} types of transformers {found['transformers']}, {served} are served.",
            "",
            *_rows(types),
            "",
            f"Of {len(vision)} families of vision-language models, the text part of {seen} is served.",
            "",
            *_rows(vision),
        ]
    )


def _rows(types: dict[str, dict[str, str]]) -> list[str]:
    rows = ["| `model_type` | class | | why |", "| --- | --- | --- | --- |"]
    for name, each in sorted(types.items()):
        reason = each["reason"].replace("|", r"\|")
        rows.append(f"| `{name}` | {each['class']} | {each['outcome']} | {reason} |")
    return rows


def with_table(page: str) -> str:
    """The page with its table replaced by the current one."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


def try_again(chosen: list[str]) -> None:
    """Write what the server makes of the types (all unless some are chosen) into the table's data."""
    sys.path[:0] = [str(ROOT / "server"), str(ROOT)]
    import transformers
    from transformers.models.auto import modeling_auto

    from tests.models.front_door import try_type
    from tests.models.zoo import MODEL_TYPES, VISION_TYPES

    transformers.logging.set_verbosity_error()
    classes = {
        "types": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "vision": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
    known: dict[str, Any] = json.loads(OUTCOMES.read_text(encoding="utf-8")) if chosen else {}
    found: dict[str, dict[str, Any]] = {part: dict(known.get(part, {})) for part in classes}
    for wanted in chosen or [*MODEL_TYPES, *(f"vision:{name}" for name in VISION_TYPES)]:
        sense, _, name = wanted.rpartition(":")
        part = "vision" if sense else "types"
        with tempfile.TemporaryDirectory() as folder:
            outcome = try_type(name, Path(folder), sees=bool(sense))
        found[part][name] = {
            "class": str(classes[part][name]), "outcome": outcome.kind, "reason": outcome.detail
        }  # fmt: skip
    whole = {"transformers": transformers.__version__} | {part: dict(sorted(found[part].items())) for part in classes}
    OUTCOMES.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if "--try" in sys.argv:
        try_again(sys.argv[sys.argv.index("--try") + 1 :])
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
