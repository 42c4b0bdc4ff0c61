"""`manylora recipe` as a person types it."""

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from manylora.cli.main import build
from manylora.lifecycle.recipes import RECIPES, all_commands
from manylora.lifecycle.recipes.cases import CASES


def run(*words: str) -> Result:
    return CliRunner().invoke(build(), ["recipe", *words])


def test_data_is_written_and_the_commands_that_follow_are_printed(tmp_path: Path) -> None:
    done = run("city-zh", "--out", str(tmp_path / "data"))

    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["test.jsonl", "train.jsonl", "valid.jsonl"]
    printed = [shlex.split(line)[:2] for line in done.stdout.splitlines()]
    assert printed == [["manylora", word] for word in ("train", "evaluate", "evaluate", "recipe")]
    assert f"--data {tmp_path}/data/train.jsonl --eval {tmp_path}/data/valid.jsonl" in done.stdout


def test_list_names_every_recipe() -> None:
    assert [line.split()[0] for line in run("list").stdout.splitlines()] == [*RECIPES, *CASES]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["weather"], "choose one of city-zh, sentiment-en"),
        (["sql", "--source", "x.gz"], "The data of sql is generated"),
        (["devil", "--source", "nowhere.dz"], "nowhere.dz does not exist"),
        (["sql", "--scores", "evaluate.json"], "give --ship too"),
        (["sql", "--ship", "out/sql"], "give --scores evaluate.json"),
        (["sql", "--held", "evaluate.json"], "evaluate.json does not exist"),
    ],
)
def test_bad_arguments_are_refused(words: list[str], why: str, tmp_path: Path) -> None:
    done = run(*words, "--out", str(tmp_path / "data"))

    assert done.exit_code == 1
    assert why in done.stderr
    assert not (tmp_path / "data").exists()


def test_data_that_exists_is_replaced_only_when_told_so(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "data")]
    first = run("sql", *out)

    again, replaced = run("sql", *out), run("sql", "--seed", "1", "--overwrite", *out)

    assert (first.exit_code, again.exit_code, replaced.exit_code) == (0, 1, 0)


@pytest.mark.parametrize("name", RECIPES)
def test_the_five_commands_fit_together(name: str) -> None:
    data, train, score, told, ship = (shlex.split(line) for line in all_commands(RECIPES[name]))

    folder, adapter = data[-1], train[train.index("--out") + 1]
    assert train[3] == f"{folder}/train.jsonl"
    assert score[score.index("--adapter") + 1] == adapter == ship[ship.index("--ship") + 1]
    assert ship[ship.index("--scores") + 1] == f"{score[-1]}/evaluate.json"
    assert ship[ship.index("--told") + 1] == f"{told[-1]}/evaluate.json"
