"""The adapters in `adapters/`: what they are, and that their cards say what the recipes do."""

import json
import re
from pathlib import Path

import pytest

from manylora.cli.offline import validate_offline
from manylora.lifecycle.recipes import RECIPES, Places, all_commands
from manylora.lifecycle.recipes.commands import hold
from manylora.lifecycle.recipes.ship import defaults_text, held_title

ROOT = Path(__file__).parents[3]
ADAPTERS = ROOT / "adapters"


def card(name: str) -> str:
    return (ADAPTERS / name / "README.md").read_text(encoding="utf-8")


def table(name: str) -> dict[str, dict[str, tuple[float, float, float]]]:
    """metric: column: (value, low, high) of the card's scores."""
    rows = [line.strip("| ").split(" | ") for line in card(name).splitlines() if line.startswith("|")]
    heading = next(row for row in rows if row[-1] == "p")
    found = {}
    for row in rows:
        if len(row) == len(heading) + 1 and "[" in row[1] and re.fullmatch(r"[\d.e-]+", row[-1]):
            numbers = [re.findall(r"[\d.]+(?:e[+-]?\d+)?", cell) for cell in row[1:-1]]
            found[row[0]] = {
                column: (float(v), float(low), float(high))
                for column, (v, low, high) in zip(heading[:-1], numbers, strict=True)
            }
    return found


def test_every_recipe_has_its_adapter_and_every_adapter_its_recipe() -> None:
    assert sorted(path.name for path in ADAPTERS.iterdir() if path.is_dir()) == sorted(RECIPES)


def test_together_they_are_small() -> None:
    assert sum(path.stat().st_size for path in ADAPTERS.rglob("*") if path.is_file()) < 1_200_000 * len(RECIPES)
    for name in RECIPES:
        assert json.loads((ADAPTERS / name / "adapter_config.json").read_text())["r"] <= 8


@pytest.mark.parametrize("name", RECIPES)
def test_card_prints_the_recipes_commands_and_origin(name: str) -> None:
    text = card(name)

    assert "\n".join(all_commands(RECIPES[name])) in text
    assert RECIPES[name].origin in text
    assert f"Licence: {RECIPES[name].licence}." in text
    assert re.search(r"Training took \d+ s on ", text)


@pytest.mark.parametrize("name", RECIPES)
def test_card_shows_the_adapter_clearly_better_than_the_base_even_when_told_the_task(name: str) -> None:
    scores = table(name)

    assert list(scores)
    for metric, columns in scores.items():
        ours = columns["adapter"]
        for rival in ("base", "base, told the task"):
            if metric.startswith("perplexity"):
                assert ours[2] < columns[rival][1], (metric, rival)
            else:
                assert ours[1] > columns[rival][2], (metric, rival)


@pytest.mark.parametrize("name", RECIPES)
def test_defaults_are_the_recipes_and_the_card_says_what_holding_answers_changes(name: str) -> None:
    recipe, file = RECIPES[name], ADAPTERS / name / "manylora.json"

    assert (file.read_text(encoding="utf-8") if file.exists() else "{}\n") == defaults_text(recipe)
    assert ("## Held to its " in card(name)) == bool(recipe.held_to)
    assert f"## {held_title(recipe)}\n" in card(name) or not recipe.held_to
    assert "\n".join(hold(recipe, Places.of(recipe))) in card(name)


def test_a_classifiers_choices_are_its_labels() -> None:
    labels = {row["label"] for row in RECIPES["city-zh"].splits(0).train}
    assert set(RECIPES["city-zh"].defaults["choices"]) == labels
    assert sorted(RECIPES["sentiment-en"].defaults["choices"]) == ["negative", "neutral", "positive"]


@pytest.mark.parametrize("name", RECIPES)
def test_adapter_is_the_shape_that_the_recipe_trains(name: str) -> None:
    config = json.loads((ADAPTERS / name / "adapter_config.json").read_text())
    flags = dict(zip(RECIPES[name].flags[::2], RECIPES[name].flags[1::2], strict=True))

    assert config["r"] == int(flags["--rank"])
    if "--targets" in flags:
        assert sorted(config["target_modules"]) == sorted(flags["--targets"].split(","))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_adapter_is_accepted_by_the_servers_reader(name: str, default_model_dir: Path) -> None:
    report = validate_offline(ADAPTERS / name, str(default_model_dir))

    assert report["report"]["matched"]
    assert report["report"]["warnings"] == []


def test_the_page_names_every_recipe_with_its_example() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")

    for recipe in RECIPES.values():
        assert f"| [`{recipe.name}`](../adapters/{recipe.name}/README.md) | {recipe.example} |" in page


def test_the_page_prints_the_commands_of_the_first_recipe() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")

    assert "\n".join(all_commands(RECIPES["city-zh"])[:3]) in page


@pytest.mark.parametrize("name", ["city-zh", "order-json", "sql", "calls"])
def test_page_and_card_say_how_many_rows_there_are(name: str) -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    splits = RECIPES[name].splits(0)
    learn, choose, score = len(splits.train), len(splits.valid), len(splits.test)

    assert re.search(rf"^\| `{name}` .*\| {learn} / {choose} / {score} \|$", page, re.MULTILINE)
    assert f"{learn} examples to learn from, {choose} to keep the best step by, {score} for the scores" in card(name)
