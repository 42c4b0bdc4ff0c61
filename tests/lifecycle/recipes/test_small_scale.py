"""Every recipe's own five commands, from nothing to a shipped folder, on a few rows and a tiny base."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from manylora.cli.main import build
from manylora.lifecycle.recipes import RECIPES, all_commands

pytestmark = pytest.mark.slow
SOURCES = {"devil": "dictionary", "sentiment-en": "ratings"}
ROWS = {"train": 40, "valid": 8, "test": 8}


def run(line: str, *more: str) -> None:
    words = shlex.split(line)
    done = CliRunner().invoke(build(), [*words[1:], *more])
    assert done.exit_code == 0, (line, done.output)


def keep_few(folder: Path) -> None:
    """The first rows of each label, or the shortest of all: the tiny base reads bytes, and holds few of them."""
    for part, count in ROWS.items():
        path = folder / f"{part}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        by_label: dict[str, list[str]] = {}
        for line, row in sorted(zip(lines, rows, strict=True), key=lambda pair: len(pair[0].encode())):
            by_label.setdefault(row.get("label", ""), []).append(line)
        kept = [line for group in by_label.values() for line in group[: max(1, count // len(by_label))]]
        path.write_text("\n".join(kept) + "\n", encoding="utf-8")


def with_room(base: Path, folder: Path) -> Path:
    """The base with a longer context: it reads bytes, and functions are described at length."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_commands_make_an_adapter_that_is_better_than_its_base(
    name: str, tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    data, train, score, told, ship = all_commands(RECIPES[name])
    source = ["--source", str(request.getfixturevalue(SOURCES[name]))] if name in SOURCES else []
    model = with_room(tiny_llama_dir, tmp_path / "base") if name == "calls" else tiny_llama_dir
    base = ["--model", str(model), "--dtype", "float32", "--device", "cpu"]

    run(data, *source)
    keep_few(Path("data") / name)
    run(train, *base)
    run(score, *base)
    run(told, *base)
    run(ship, "--machine", "a small machine")

    scores = json.loads(Path(f"out/{name}.scores/evaluate.json").read_text())["contenders"]
    assert scores[name]["perplexity"]["value"] < scores["base"]["perplexity"]["value"]
    assert scores[name]["against_reference"]["perplexity"]["p"] < 0.05
    assert "on a small machine (float32)" in Path(f"adapters/{name}/README.md").read_text()
