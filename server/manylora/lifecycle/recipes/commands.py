"""The commands that make a recipe's adapter: what the program prints, and what card and page show."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from manylora.lifecycle.recipes.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Places:
    """Where the data lies and what is made from it; relative, so that a printed command runs anywhere."""

    data: Path
    adapter: Path

    @staticmethod
    def of(recipe: Recipe) -> "Places":
        return Places(Path("data") / recipe.name, Path("out") / recipe.name)

    @property
    def scores(self) -> Path:
        return self.adapter.with_name(f"{self.adapter.name}.scores")

    @property
    def held(self) -> Path:
        return self.adapter.with_name(f"{self.adapter.name}.held")

    @property
    def told(self) -> Path:
        return self.adapter.with_name(f"{self.adapter.name}.told")


def make_data(recipe: Recipe, places: Places) -> str:
    return _line("recipe", recipe.name, "--out", places.data)


def train(recipe: Recipe, places: Places) -> str:
    files = ("--data", places.data / "train.jsonl", "--eval", places.data / "valid.jsonl")
    return _line("train", *files, "--out", places.adapter, *recipe.flags)


def score(recipe: Recipe, places: Places) -> str:
    """The command that scores the bare base and the adapter, asked alike."""
    return _line(*_evaluate(recipe, places), "--base", "--adapter", places.adapter, "--out", places.scores)


def score_told(recipe: Recipe, places: Places) -> str:
    """The command that scores the bare base with the task spelt out before each question."""
    return _line(*_evaluate(recipe, places), "--base", "--instruction", recipe.instruction, "--out", places.told)


def ship(recipe: Recipe, places: Places) -> str:
    reports = ("--scores", places.scores / "evaluate.json", "--told", places.told / "evaluate.json")
    return _line("recipe", recipe.name, "--ship", places.adapter, *reports, "--out", Path("adapters") / recipe.name,
                 "--overwrite")  # fmt: skip


def hold(recipe: Recipe, places: Places) -> tuple[str, ...]:
    """The commands that compare the shipped folder, as `make serve` serves it, with itself without its defaults.

    None for a recipe whose adapter's answers are held to nothing.
    """
    if not recipe.held_to:
        return ()
    shipped, free = Path("adapters") / recipe.name, free_name(recipe)
    metrics = ",".join(recipe.held_metrics)
    data = ("--data", places.data / "test.jsonl", "--metrics", metrics, "--max-tokens", str(recipe.max_tokens))
    return (
        _line("adapters", "push", shipped, "--name", free),
        _line("adapters", "set", free, "--clear"),
        _line("evaluate", "--server", "http://127.0.0.1:8000", *data, "--adapter", free, "--adapter", recipe.name,
              "--out", places.held),
        _line("recipe", recipe.name, "--held", places.held / "evaluate.json", "--out", shipped),
    )  # fmt: skip


def free_name(recipe: Recipe) -> str:
    """What the shipped folder is called on a server where it has no defaults."""
    return f"{recipe.name}-free"


def all_commands(recipe: Recipe, places: Places | None = None) -> tuple[str, ...]:
    """Every command from nothing to the shipped folder, in order."""
    at = places or Places.of(recipe)
    return tuple(make(recipe, at) for make in (make_data, train, score, score_told, ship))


def _evaluate(recipe: Recipe, places: Places) -> tuple[str | Path, ...]:
    data = ("--data", places.data / "test.jsonl")
    return ("evaluate", *data, "--metrics", ",".join(recipe.metrics), "--max-tokens", str(recipe.max_tokens))


def _line(*words: str | Path) -> str:
    return shlex.join(["manylora", *(str(word) for word in words)])
