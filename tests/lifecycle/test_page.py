"""docs/lifecycle.md against the commands: every flag is there as it is, with an example of every command."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "lifecycle.md"


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("document_lifecycle", ROOT / "scripts" / "document_lifecycle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_flags_are_those_that_make_docs_writes() -> None:
    page = PAGE.read_text(encoding="utf-8")

    assert _script().with_tables(page) == page, "run `make docs`"


@pytest.mark.parametrize("command", _script().COMMANDS)
def test_every_command_has_a_table_of_explained_flags_and_an_example(command: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = _script().table(command).splitlines()[2:]

    assert all(re.fullmatch(r"\| `[^`]+` \|.*\| \S.* \|", row) for row in rows)
    assert "\n".join(rows) in page
    assert re.search(rf"^```bash\n(?:.*\n)*?manylora {command} ", page, re.MULTILINE)
    assert f"\n## {command}\n" in page


def test_every_metric_is_explained() -> None:
    from manylora.lifecycle.evaluate.scores import HIGHER_IS_BETTER

    page = PAGE.read_text(encoding="utf-8")

    assert [name for name in HIGHER_IS_BETTER if f"`{name}`" not in page] == []
