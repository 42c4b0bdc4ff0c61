"""The README.md of an adapter: what it does, how it was made, how it scored."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from manylora.identity import CARD_FILE

MADE: Final = "How it was made"
SCORES: Final = "Scores"
_LONGEST_COMMAND: Final = 1000  # characters of it in the front matter; the section has all of it
_SAID: Final = {
    "accuracy": "accuracy",
    "macro_f1": "F1, mean of labels",
    "auc": "area under the curve",
    "span_f1": "F1 of spans",
    "exact_match": "exact answers",
    "word_f1": "F1 of answers' words",
    "ndcg_10": "nDCG of the first ten",
    "mrr": "reciprocal rank",
    "wer": "word error rate",
    "cer": "character error rate",
}


@dataclass(frozen=True, slots=True)
class Card:
    """The parts of a card; empty ones are left out.

    `examples`, prompts to try, and `lineage`, how it was made in a form for programs, are its front matter.
    """

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    sections: tuple[tuple[str, str], ...] = field(default=())
    examples: tuple[str, ...] = ()
    lineage: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of_training(title: str, command: str, report: dict[str, Any]) -> "Card":
        """The card that training itself can write: shape, data, cost and losses."""
        lora, lengths = report["settings"]["lora"], report["lengths"]["train"]
        digest = report.get("data_sha256", {}).get("data")
        alpha = 2 * lora["rank"] if lora["alpha"] is None else lora["alpha"]
        facts = [
            ("Base", report["base"]),
            ("Rank, alpha", f"{lora['rank']}, {alpha:g}{_kind(lora)}" if lora["rank"] else "0: the head alone"),
            *([("Targets", ", ".join(lora["targets"]) or "every linear but the head")] if lora["rank"] else []),
            ("Parameters", f"{report['num_parameters']:,} ({report['size_bytes'] / 1e6:.2f} MB)"),
            ("Data", f"{lengths['num_examples']} examples, {lengths['num_tokens']:,} tokens an epoch"),
            *([("Data's SHA-256", f"`{digest}`")] if digest else []),
            ("Training", f"{report['steps']} steps in {report['seconds']:.0f} s on {report['device']}"),
        ]
        if report["best_eval_loss"] is not None:
            unit = "a pair of answers" if report["settings"].get("method") == "dpo" else "nats per answer token"
            unit = f"nats per {report['unit']}" if report.get("unit") else unit
            facts.append(("Held-out loss", f"{report['best_eval_loss']:.4f} {unit}"))
        facts += _scores(report)
        made = ((MADE, f"```\n{command}\n```"),) if command else ()
        return Card(title, tuple(facts), made, lineage=_trained(command, report))

    @staticmethod
    def of_weights(title: str, command: str, facts: tuple[tuple[str, str], ...]) -> "Card":
        """The card of an adapter that was computed from weights, without training."""
        made = ((MADE, f"```\n{command}\n```"),) if command else ()
        return Card(title, facts, made, lineage=_lineage(command))

    def markdown(self) -> str:
        widget = [f"- text: {json.dumps(text, ensure_ascii=False)}" for text in self.examples]
        front = ["widget:", *widget] if widget else []
        front += [f"lineage: {json.dumps(self.lineage, ensure_ascii=False)}"] if self.lineage else []
        front = ["---", *front, "---", ""] if front else []
        lines = [*front, f"# {self.title}", ""]
        if self.facts:
            lines += ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in self.facts), ""]
        for heading, text in self.sections:
            lines += [f"## {heading}", "", text.strip(), ""]
        return "\n".join(lines).rstrip() + "\n"


def _lineage(command: str, **more: Any) -> dict[str, Any]:
    short = command if len(command) <= _LONGEST_COMMAND else f"{command[: _LONGEST_COMMAND - 1]}…"
    return {name: value for name, value in {"command": short, **more}.items() if value}


def _trained(command: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """Of a training: the command, which bytes it learnt from, and what it scored on those that were held out."""
    scores = {"held-out loss": report["best_eval_loss"]}
    found = report.get("scores", {})
    scores |= {f"held-out {_short(name)}": found[name] for name in _SAID if name in found}
    known = {name: round(value, 4) for name, value in scores.items() if value is not None}
    digests = report.get("data_sha256", {})
    return _lineage(command, data_sha256=digests.get("data"), eval_sha256=digests.get("eval"), scores=known)


def _short(name: str) -> str:
    """A metric's name without underscores: "macro F1"."""
    return name.replace("_f1", " F1").replace("_", " ")


def _scores(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What an adapter that does not write scored on rows held out, and the base where it does the task, too."""
    scores, before = report.get("scores", {}), report.get("base_scores", {})
    found = list[tuple[str, str]]()
    for name, said in _SAID.items():
        if name in scores:
            of = f" of {scores['num_examples']}" if not found else ""
            found.append(
                (f"Held-out {said}", f"{scores[name]:.3f}{of}" + (f"; base {before[name]:.3f}" if before else ""))
            )
    return found


def with_section(markdown: str, heading: str, text: str, *, before: str) -> str:
    """A card's text with this section, which stands before another and takes the place of one of the same heading."""
    parts = markdown.split("\n## ")
    kept = [part for part in parts if not part.startswith(f"{heading}\n")]
    place = next((number for number, part in enumerate(kept) if part.startswith(f"{before}\n")), len(kept))
    kept.insert(place, f"{heading}\n\n{text.strip()}\n")
    return "\n## ".join(kept).rstrip() + "\n"


def scores_table(report: Mapping[str, Any], name: str) -> str:
    """An evaluation's scores of one adapter beside the first contender's, as a table with what they are of."""
    reference = report["reference"]
    others = [] if name == reference else [reference]
    columns = [*others, name]
    lines = [
        f"| | {' | '.join(columns)} |{' p |' if others else ''}",
        "| --- |" + " --- |" * (len(columns) + len(others)),
    ]
    for metric in report["metrics"]:
        found = [report["contenders"][column][metric] for column in columns]
        cells = [f"{one['value']:.3g} [{one['low']:.3g}, {one['high']:.3g}]" for one in found]
        if others:
            cells.append(f"{report['contenders'][name]['against_reference'][metric]['p']:.2g}")
        lines.append(f"| {metric} | {' | '.join(cells)} |")
    about = f"On {report['num_examples']} examples of {report['data']}, greedy; in brackets 95 % bootstrap intervals"
    return "\n".join([*lines, "", f"{about}{', p from a paired test' if others else ''}."])


def write_card(folder: Path, card: Card) -> None:
    (folder / CARD_FILE).write_text(card.markdown(), encoding="utf-8")


def _kind(lora: dict[str, Any]) -> str:
    """How the shape differs from plain LoRA: " (rsLoRA, DoRA)", or nothing."""
    names = {"rslora": "rsLoRA", "dora": "DoRA", "trained_tokens": "trained tokens"}
    found = [said for name, said in names.items() if lora.get(name)]
    found += ["PiSSA"] if lora.get("init") == "pissa" else []
    return f" ({', '.join(found)})" if found else ""
