"""From reports to a shipped folder: only what the recipe's own commands made."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from manylora.errors import InvalidRequest
from manylora.lifecycle.recipes import RECIPES, Places, all_commands
from manylora.lifecycle.recipes.commands import hold
from manylora.lifecycle.recipes.ship import Made, ship, ship_held

RECIPE = RECIPES["sql"]


def _interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.05, "high": value + 0.05}


def _scores(**contenders: float) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, value in contenders.items():
        entries[name] = {metric: _interval(value) for metric in RECIPE.metrics}
        entries[name]["answers"] = [f"{name} says {n} | so" for n in range(6)]
        entries[name]["against_reference"] = {metric: {"p": 0.0005} for metric in RECIPE.metrics}
    return {
        "contenders": entries, "reference": "base", "metrics": list(RECIPE.metrics), "max_tokens": RECIPE.max_tokens,
        "num_examples": 160, "gold": [f"right {n}" for n in range(6)], "prompts": [f"ask {n}" for n in range(6)],
    }  # fmt: skip


TRAINED = {
    "settings": {
        "lora": {"rank": 8, "alpha": None, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"], "rslora": False},
        "schedule": {"lr": 2e-3, "epochs": 1, "batch_size": 8}, "max_length": 160,
    },
    "lengths": {"train": {"num_examples": 700, "num_tokens": 45000}}, "num_eval_examples": 48, "base": "some-base",
    "num_parameters": 1000, "size_bytes": 2000, "steps": 88, "seconds": 171.4, "device": "cpu", "dtype": "bfloat16",
    "best_eval_loss": 0.0222,
}  # fmt: skip


@pytest.fixture
def made(tmp_path: Path) -> Made:
    adapter = tmp_path / "sql"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    reports = {"train": TRAINED, "scores": _scores(base=0.1, sql=0.9), "told": _scores(base=0.3)}
    for name, report in reports.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    paths = {name: tmp_path / f"{name}.json" for name in reports}
    return Made(adapter, paths["train"], paths["scores"], "two cores", paths["told"])


def test_folder_holds_the_adapter_and_its_card(made: Made, tmp_path: Path) -> None:
    ship(RECIPE, made, tmp_path / "shipped")

    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "shipped").iterdir()) == names
    assert (tmp_path / "shipped" / "adapter_model.safetensors").read_bytes() == b"weights"


def test_card_says_what_it_does_where_from_how_long_and_how_well(made: Made, tmp_path: Path) -> None:
    ship(RECIPE, made, tmp_path / "shipped")

    card = (tmp_path / "shipped" / "README.md").read_text()
    assert RECIPE.summary in card
    assert RECIPE.origin in card
    assert f"Licence: {RECIPE.licence}" in card
    assert "Training took 171 s on two cores (bfloat16)." in card
    assert "| answers that match exactly | 0.1 [0.05, 0.15] | 0.3 [0.25, 0.35] | 0.9 [0.85, 0.95] | 0.0005 |" in card
    assert all(line in card for line in all_commands(RECIPE))


def test_samples_are_the_files_last_and_bars_in_them_do_not_break_the_table(made: Made, tmp_path: Path) -> None:
    ship(RECIPE, made, tmp_path / "shipped")

    card = (tmp_path / "shipped" / "README.md").read_text()
    assert r"| ask 5 | right 5 | base says 5 \| so | sql says 5 \| so |" in card
    assert "ask 1" not in card


def test_only_the_metrics_to_be_shown_are_in_the_table(made: Made, tmp_path: Path) -> None:
    ship(replace(RECIPE, shown=("perplexity",)), made, tmp_path / "shipped")

    assert "match exactly" not in (tmp_path / "shipped" / "README.md").read_text()


def test_defaults_are_shipped_beside_the_adapter(made: Made, tmp_path: Path) -> None:
    ship(replace(RECIPE, defaults={"choices": ["上海"]}), made, tmp_path / "shipped")

    assert json.loads((tmp_path / "shipped" / "manylora.json").read_text(encoding="utf-8")) == {"choices": ["上海"]}


def _held_report(path: Path, *names: str) -> Path:
    answers = [["a", "b", "free words", "a"], ["a", "b", "a", "a"]]
    contenders = {
        name: {
            "accuracy": _interval(0.5 + number / 10),
            "answers": answers[number],
            "against_reference": {"accuracy": {"p": 0.25}},
        }
        for number, name in enumerate(names)
    }
    report = {"contenders": contenders, "metrics": ["accuracy"], "labels": ["a", "b"], "max_tokens": RECIPE.max_tokens}
    path.write_text(json.dumps(report))
    return path


def test_the_card_says_once_what_the_labels_change_and_by_which_commands(made: Made, tmp_path: Path) -> None:
    recipe = replace(RECIPE, defaults={"choices": ["a", "b"]})
    ship(recipe, made, tmp_path / "shipped")
    before = (tmp_path / "shipped" / "README.md").read_text()
    report = _held_report(tmp_path / "held.json", "sql-free@1", "sql@3")

    for _ in range(2):
        ship_held(recipe, report, tmp_path / "shipped")

    card = (tmp_path / "shipped" / "README.md").read_text()
    assert "| 0.5 [0.45, 0.55] | 0.6 [0.55, 0.65] | 0.25 |" in card
    assert "| answers that are none of the labels | 1 | 0 | |" in card
    assert "\n".join(hold(recipe, Places.of(recipe))) in card
    assert card.count("## Held to its labels") == 1
    assert card.index("## Held to its labels") < card.index("## The same questions")
    start, end = card.index("## Held"), card.index("## The same")
    assert card[:start] + card[end:] == before


def test_a_report_of_something_else_is_not_put_into_the_card(made: Made, tmp_path: Path) -> None:
    recipe = replace(RECIPE, defaults={"choices": ["a", "b"]})
    report = _held_report(tmp_path / "held.json", "sql-free@1", "sql@1")
    with pytest.raises(InvalidRequest, match="ship the adapter"):
        ship_held(recipe, report, tmp_path / "shipped")
    ship(recipe, made, tmp_path / "shipped")
    with pytest.raises(InvalidRequest, match="not of the commands"):
        ship_held(RECIPE, report, tmp_path / "shipped")
    with pytest.raises(InvalidRequest, match="not of the commands"):
        ship_held(recipe, _held_report(report, "sql@1", "sql-free@1"), tmp_path / "shipped")


def _settings(report: dict[str, Any]) -> None:
    report["settings"]["schedule"]["epochs"] = 5


def _metrics(report: dict[str, Any]) -> None:
    report["metrics"] = ["perplexity"]


def _three(report: dict[str, Any]) -> None:
    report["contenders"]["other"] = report["contenders"]["sql"]


@pytest.mark.parametrize(
    ("report", "spoil", "why"),
    [
        ("train", _settings, "says --epochs 5, the recipe 1"),
        ("scores", _metrics, "other metrics"),
        ("told", _metrics, "other metrics"),
        ("scores", _three, "must score the base and the adapter"),
    ],
)
def test_reports_of_other_commands_are_refused(
    made: Made, tmp_path: Path, report: str, spoil: Callable[[dict[str, Any]], None], why: str
) -> None:
    path = tmp_path / f"{report}.json"
    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))

    with pytest.raises(InvalidRequest, match=why):
        ship(RECIPE, made, tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()


def test_missing_report_is_said(made: Made, tmp_path: Path) -> None:
    (tmp_path / "scores.json").unlink()

    with pytest.raises(InvalidRequest, match="train and evaluate first"):
        ship(RECIPE, made, tmp_path / "shipped")
