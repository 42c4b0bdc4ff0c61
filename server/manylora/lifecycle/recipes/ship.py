"""From a trained and scored adapter to a shipped one: three files, and a card that anyone can check."""

import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manylora.errors import InvalidRequest
from manylora.lifecycle.adapter_files import CONFIG, WEIGHTS
from manylora.lifecycle.card import Card, write_card
from manylora.lifecycle.output import atomic_folder
from manylora.lifecycle.recipes.recipe import Recipe

_METRIC_NAMES = {
    "exact_match": "answers that match exactly",
    "accuracy": "accuracy (the answer is the right label and nothing else)",
    "mentioned": "the right label is named first, in whatever words",
    "macro_f1": "macro F1",
    "valid_json": "answers that are JSON with the right keys",
    "perplexity": "perplexity of the right answer",
}


@dataclass(frozen=True, slots=True)
class Made:
    """Where the pieces lie, and what the machine was. `told` scores the base with the task in the prompt."""

    adapter: Path
    train_report: Path
    scores: Path
    machine: str
    told: Path | None = None


def ship(recipe: Recipe, made: Made, out: Path) -> None:
    """Write `adapter_config.json`, `adapter_model.safetensors` and the card into `out`, whole or not at all.

    Raises InvalidRequest when a report is missing or does not score the base and one adapter.
    """
    for path in (made.adapter / CONFIG, made.adapter / WEIGHTS, made.train_report, made.scores):
        if not path.is_file():
            raise InvalidRequest(f"{path} does not exist: train and evaluate first.")
    trained = json.loads(made.train_report.read_text(encoding="utf-8"))
    scores = json.loads(made.scores.read_text(encoding="utf-8"))
    if len(scores["contenders"]) != 2 or scores["reference"] != "base":
        raise InvalidRequest(f"{made.scores} must score the base and the adapter: evaluate with --base --adapter.")
    with atomic_folder(out) as draft:
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(made.adapter / name, draft / name)
        told = json.loads(made.told.read_text(encoding="utf-8")) if made.told else None
        write_card(draft, recipe_card(recipe, trained, scores, made.machine, told))


def recipe_card(
    recipe: Recipe, trained: dict[str, Any], scores: dict[str, Any], machine: str, told: dict[str, Any] | None = None
) -> Card:
    facts = Card.of_training(recipe.title, "", trained).facts
    data = (
        f"{recipe.origin}; licence: {recipe.licence}. {trained['lengths']['train']['num_examples']} examples to learn "
    )
    data += f"from, {trained['num_eval_examples']} to keep the best step by, {scores['num_examples']} for the scores."
    sections = (
        ("Ask it", _ask(recipe)),
        ("Scores on held-out examples", _table(recipe, scores, told)),
        ("The same questions, base and adapter", _samples(scores)),
        ("Data", f"{recipe.summary} Data: {data}"),
        (
            "How it was made",
            f"```\n{_commands(recipe, scores)}\n```\n\nTraining took {trained['seconds']:.0f} s on {machine}.",
        ),
    )
    return Card(recipe.title, facts, sections)


def _ask(recipe: Recipe) -> str:
    body = {
        "model": recipe.name,
        "messages": [{"role": "user", "content": recipe.example}],
        "temperature": 0,
        "max_tokens": recipe.max_tokens,
    }
    return (
        f"{recipe.summary} Send the sentence as one user message, without a system message:\n\n"
        "```\ncurl -s http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\\n"
        f"  -d {shlex.quote(json.dumps(body, ensure_ascii=False))}\n```"
    )


def _table(recipe: Recipe, scores: dict[str, Any], told: dict[str, Any] | None) -> str:
    adapter = next(name for name in scores["contenders"] if name != "base")
    columns = [scores["contenders"]["base"], scores["contenders"][adapter]]
    names = ["base", "adapter"]
    note = "In brackets 95 % bootstrap intervals; p from a paired randomisation test. Greedy decoding."
    if told is not None:
        columns.insert(1, told["contenders"]["base"])
        names.insert(1, "base, told the task")
        note += f" The base was told the task by this line before each question: `{recipe.instruction}`"
    lines = [f"| | {' | '.join(names)} | p |", "| --- |" + " --- |" * (len(names) + 1)]
    for metric in scores["metrics"]:
        cells = [f"{c[metric]['value']:.3g} [{c[metric]['low']:.3g}, {c[metric]['high']:.3g}]" for c in columns]
        p = columns[-1]["against_reference"][metric]["p"]
        lines.append(f"| {_METRIC_NAMES[metric]} | {' | '.join(cells)} | {p:.2g} |")
    return "\n".join([*lines, "", note])


def _samples(scores: dict[str, Any], count: int = 4) -> str:
    """The last examples of the file: not chosen, so not flattering."""
    adapter = next(name for name in scores["contenders"] if name != "base")
    lines = ["| asked | wanted | base | adapter |", "| --- | --- | --- | --- |"]
    for index in range(len(scores["gold"]) - count, len(scores["gold"])):
        base = scores["contenders"]["base"]["answers"][index]
        ours = scores["contenders"][adapter]["answers"][index]
        lines.append(
            "| " + " | ".join(_cell(t) for t in (scores["prompts"][index], scores["gold"][index], base, ours)) + " |"
        )
    return "\n".join(lines)


def _cell(text: str) -> str:
    flat = " ".join(text.split()).replace("|", "\\|")
    return flat if len(flat) <= 110 else flat[:107] + "…"


def _commands(recipe: Recipe, scores: dict[str, Any]) -> str:
    data = f"data/{recipe.name}"
    train = [
        "manylora",
        "train",
        "--data",
        f"{data}/train.jsonl",
        "--eval",
        f"{data}/valid.jsonl",
        "--out",
        f"out/{recipe.name}",
    ]
    test = ["manylora", "evaluate", "--data", f"{data}/test.jsonl", "--base", "--adapter", f"out/{recipe.name}"]
    test += [
        "--metrics",
        ",".join(scores["metrics"]),
        "--max-tokens",
        str(scores["max_tokens"]),
        "--out",
        f"out/{recipe.name}.scores",
    ]
    lines = (["manylora", "recipe", recipe.name, "--out", data], [*train, *recipe.flags], test)
    return "\n".join(shlex.join(line) for line in lines)
