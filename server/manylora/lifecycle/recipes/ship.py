"""From a trained and scored adapter to a shipped one: three files, and a card that anyone can check."""

import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manylora.errors import InvalidRequest
from manylora.identity import ADAPTER_FILES, CARD_FILE, DEFAULTS_FILE
from manylora.lifecycle.card import Card, with_section, write_card
from manylora.lifecycle.output import atomic_file, atomic_folder
from manylora.lifecycle.recipes.commands import Places, all_commands, free_name, hold
from manylora.lifecycle.recipes.recipe import Recipe

_METRIC_NAMES = {
    "exact_match": "answers that match exactly",
    "accuracy": "accuracy (the answer is the right label and nothing else)",
    "mentioned": "the right label is named first, in whatever words",
    "macro_f1": "macro F1",
    "valid_json": "answers that are JSON with the right keys",
    "perplexity": "perplexity of the right answer",
}

_SAMPLES = "The same questions, base and adapter"

_FLAGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "--rank": lambda s: s["lora"]["rank"],
    "--targets": lambda s: ",".join(s["lora"]["targets"]),
    "--lr": lambda s: s["schedule"]["lr"],
    "--epochs": lambda s: s["schedule"]["epochs"],
    "--batch-size": lambda s: s["schedule"]["batch_size"],
    "--max-length": lambda s: s["max_length"],
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

    Raises InvalidRequest when a report is missing, or comes from other settings than those that the card prints.
    """
    for path in (*(made.adapter / name for name in ADAPTER_FILES), made.train_report, made.scores, made.told):
        if path is not None and not path.is_file():
            raise InvalidRequest(f"{path} does not exist: train and evaluate first.")
    trained, scores = _read(made.train_report), _read(made.scores)
    told = _read(made.told) if made.told else None
    if len(scores["contenders"]) != 2 or scores["reference"] != "base":
        raise InvalidRequest(f"{made.scores} must score the base and the adapter: evaluate with --base --adapter.")
    check_settings(recipe.flags, trained, made.train_report)
    _check_scores(recipe, scores, made.scores)
    if made.told is not None and told is not None:
        _check_scores(recipe, told, made.told)
    with atomic_folder(out) as draft:
        for name in ADAPTER_FILES:
            shutil.copyfile(made.adapter / name, draft / name)
        if recipe.defaults:
            (draft / DEFAULTS_FILE).write_text(defaults_text(recipe), encoding="utf-8")
        write_card(draft, recipe_card(recipe, trained, scores, made.machine, told))


def defaults_text(recipe: Recipe) -> str:
    """The `manylora.json` of the shipped folder."""
    return json.dumps(recipe.defaults, ensure_ascii=False, indent=2) + "\n"


def ship_held(recipe: Recipe, report: Path, shipped: Path) -> None:
    """Put into a shipped folder's card what holding its answers changes, from the report of `hold`'s commands.

    Raises InvalidRequest where the report is another's, or the folder has no card.
    """
    card = shipped / CARD_FILE
    for path in (report, card):
        if not path.is_file():
            raise InvalidRequest(f"{path} does not exist: ship the adapter and evaluate it on a server first.")
    scores, commands = _read(report), hold(recipe, Places.of(recipe))
    compared = [name.partition("@")[0] for name in scores["contenders"]]
    if not commands or compared != [free_name(recipe), recipe.name] or scores["max_tokens"] != recipe.max_tokens:
        raise InvalidRequest(
            f"{report} is not of the commands that compare {recipe.name} with itself without defaults."
        )
    printed = "\n".join(commands)
    section = f"{_held_table(recipe, scores)}\n\n```\n{printed}\n```"
    text = with_section(card.read_text(encoding="utf-8"), held_title(recipe), section, before=_SAMPLES)
    with atomic_file(card) as draft:
        draft.write_text(text, encoding="utf-8")


def held_title(recipe: Recipe) -> str:
    """The heading of the card's section on what holding its answers changes."""
    return f"Held to its {recipe.held_to}"


def _held_table(recipe: Recipe, scores: dict[str, Any]) -> str:
    free, held = scores["contenders"].values()
    lines = [f"| | free | held to its {recipe.held_to} | p |", "| --- | --- | --- | --- |"]
    for metric in scores["metrics"]:
        p = held["against_reference"][metric]["p"]
        lines.append(f"| {_METRIC_NAMES[metric]} | {_interval(free[metric])} | {_interval(held[metric])} | {p:.2g} |")
    if recipe.held_to == "labels":
        labels = set(scores["labels"])
        others = [sum(answer.strip() not in labels for answer in each["answers"]) for each in (free, held)]
        lines.append(f"| answers that are none of the labels | {others[0]} | {others[1]} | |")
    return "\n".join(
        [
            *lines,
            "",
            f"The folder's `manylora.json` holds every answer to the {recipe.held_to}, whatever the client is. On a "
            "server that `make serve` has started, on the same held-out examples, greedy:",
        ]
    )


def _read(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def check_settings(flags: Sequence[str], trained: dict[str, Any], path: Path) -> None:
    """Refuse what other settings trained or scored than those that the card prints. Raises InvalidRequest."""
    for flag, wanted in zip(flags[::2], flags[1::2], strict=True):
        found = _FLAGS[flag](trained["settings"])
        if found != type(found)(wanted):
            raise InvalidRequest(f"{path} says {flag} {found}, the recipe {wanted}: train with the recipe's command.")


def _check_scores(recipe: Recipe, scores: dict[str, Any], path: Path) -> None:
    if tuple(scores["metrics"]) != recipe.metrics or scores["max_tokens"] != recipe.max_tokens:
        raise InvalidRequest(f"{path} has other metrics or --max-tokens than the recipe: evaluate with its command.")


def recipe_card(
    recipe: Recipe, trained: dict[str, Any], scores: dict[str, Any], machine: str, told: dict[str, Any] | None = None
) -> Card:
    facts = Card.of_training(recipe.title, "", trained).facts
    learn, choose = trained["lengths"]["train"]["num_examples"], trained["num_eval_examples"]
    data = (
        f"Origin: {recipe.origin}. Licence: {recipe.licence}. {learn} examples to learn from, {choose} to keep the "
        f"best step by, {scores['num_examples']} for the scores; none is in two of these sets."
    )
    made = "\n".join(all_commands(recipe))
    time = f"Training took {trained['seconds']:.0f} s on {machine} ({trained['dtype']})."
    sections = (
        ("Ask it", _ask(recipe)),
        ("Scores on held-out examples", _table(recipe, scores, told)),
        (_SAMPLES, _samples(scores)),
        *([("Limits", recipe.limits)] if recipe.limits else []),
        ("Data", data),
        ("How it was made", f"```\n{made}\n```\n\n{time}"),
    )
    return Card(recipe.title, facts, sections, (recipe.example,))


def _ask(recipe: Recipe) -> str:
    body = {
        "model": recipe.name,
        "messages": [{"role": "user", "content": recipe.example}],
        "temperature": 0,
        "max_tokens": recipe.max_tokens,
        **recipe.asked_with,
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
    note = "In brackets 95 % bootstrap intervals; p from a paired randomisation test, adapter against base. Greedy."
    if told is not None:
        columns.insert(1, told["contenders"]["base"])
        names.insert(1, "base, told the task")
        note += f" The base was told the task by this line before each question: `{recipe.instruction}`"
    lines = [f"| | {' | '.join(names)} | p |", "| --- |" + " --- |" * (len(names) + 1)]
    for metric in recipe.shown or recipe.metrics:
        cells = [_interval(column[metric]) for column in columns]
        p = columns[-1]["against_reference"][metric]["p"]
        lines.append(f"| {_METRIC_NAMES[metric]} | {' | '.join(cells)} | {p:.2g} |")
    return "\n".join([*lines, "", note])


def _interval(found: dict[str, float]) -> str:
    return f"{found['value']:.3g} [{found['low']:.3g}, {found['high']:.3g}]"


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
