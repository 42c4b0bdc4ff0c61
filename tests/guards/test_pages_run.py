"""The pages that are followed from top to bottom: every command is typed in, in order, and says what the page says.

A block in `bash` or `python` is run; one below a comment `<!-- not run: why -->` is not. A block in `text` holds lines
each of which stands somewhere in what the block before it printed.
"""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.default_server import default_server
from tests.pages import ADDRESS, Block, blocks

ROOT = Path(__file__).parents[2]
SHARING = ("clients.md", "from-other-servers.md", "troubleshooting.md", "tutorial.md")  # a server
PAGES = (*SHARING, "first-hour.md")
PATIENCE_S = 1800


def type_in(block: Block, server: str, folder: Path, **more: str) -> str:
    """What the block prints, with `more` in its environment. Errors of commands are the test's."""
    text = block.text.replace(ADDRESS, server).replace(".venv/bin/", "")
    program = ["bash", "-euo", "pipefail", "-c"] if block.kind == "bash" else [sys.executable, "-c"]
    done = subprocess.run(
        [*program, text],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        timeout=PATIENCE_S,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "MANYLORA_URL": server,
            "REPOSITORY": str(ROOT),
            "no_proxy": "127.0.0.1",
            **more,
        },
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_commands_or_what_a_command_prints(page: str) -> None:
    found = blocks(page)

    assert sum(block.kind != "text" and block.why_not is None for block in found) > 1
    assert {block.kind for block in found if block.why_not is None} <= {"bash", "python", "text"}
    for before, block in itertools.pairwise(found):
        assert block.kind != "text" or (before.kind != "text" and before.why_not == block.why_not)


@pytest.mark.slow
@pytest.mark.parametrize("page", SHARING)
def test_the_commands_of_the_page_do_what_it_says(page: str, server: str, tmp_path: Path) -> None:
    follow(page, server, tmp_path)


@pytest.mark.slow
def test_the_first_hour_goes_as_the_page_says(default_model_dir: Path, tmp_path: Path) -> None:
    """On a server of its own, which the page closes."""
    assert default_model_dir.is_dir()
    (tmp_path / "served").mkdir()
    (tmp_path / "terminal").mkdir()
    with default_server(tmp_path / "served", PATIENCE_S, "--price-prompt", "0.02", "--price-completion", "0.06") as url:
        follow("first-hour.md", url, tmp_path / "terminal", MANYLORA_DATA_DIR=str(tmp_path / "served" / "data"))


def follow(page: str, server: str, folder: Path, **more: str) -> None:
    """Type the page in from its top to its bottom, and find what it says in what is printed."""
    said = ""
    for block in blocks(page):
        if block.why_not is not None:
            continue
        if block.kind == "text":
            for line in block.text.splitlines():
                assert line in said, said
        else:
            said = type_in(block, server, folder, **more)


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(server: str, tmp_path: Path) -> None:
    cells = json.loads((ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell.get("outputs") for cell in cells), "kept without what it printed"
    program = tmp_path / "notebook.py"
    program.write_text("\n\n".join(code), encoding="utf-8")
    told = {**os.environ, "MANYLORA_URL": server, "MPLBACKEND": "agg", "no_proxy": "127.0.0.1"}

    done = subprocess.run(
        [sys.executable, program],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=PATIENCE_S,
        env=told,
    )

    assert done.returncode == 0, done.stderr
    assert "sql: SELECT" in done.stdout
    assert "city-notebook@1 answers as city-notebook@1" in done.stdout
    assert f"made of {hashlib.sha256((tmp_path / 'train.jsonl').read_bytes()).hexdigest()[:12]} with" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()[-2:]] == ["base", "city-notebook@1"]


def test_flags_named_beside_other_servers_exist() -> None:
    """Of the table's right column, which is ours."""
    from manylora.cli.serve import flag_of
    from manylora.settings import Settings

    text = (ROOT / "docs" / "from-other-servers.md").read_text(encoding="utf-8")
    cells = [line.rstrip("|").rpartition(" | ")[2] for line in text.splitlines() if line.startswith("| ")]
    named = {flag for cell in cells for flag in re.findall(r"`(--[a-z-]+)", cell)}

    assert len(named) > 10
    assert named <= {flag_of(name) for name in Settings.model_fields}
