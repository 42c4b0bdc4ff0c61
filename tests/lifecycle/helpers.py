"""Small data and settings that the lifecycle's tests share."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from manylora.lifecycle.train.config import LoraShape, Schedule, TrainConfig

WORDS = {"fruit": ("apple", "pear", "plum", "fig"), "tool": ("saw", "axe", "drill", "file")}


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def label_rows(patterns: Sequence[str] = ("a {}", "my {}", "the {}", "{} here")) -> list[dict[str, str]]:
    """Words of two classes in a few patterns: what the tiniest model can learn."""
    return [
        {"text": pattern.format(word), "label": label}
        for label, words in WORDS.items()
        for word in words
        for pattern in patterns
    ]


def tiny_config(data: Path, out: Path, base: Path, **schedule: Any) -> TrainConfig:
    """Two epochs on a tiny base in fp32, everything else at its default unless `schedule` says so."""
    chosen = replace(Schedule(epochs=2, batch_size=8, lr=1e-2, checkpoint_every=2), **schedule)
    return TrainConfig(
        data=data, out=out, base=str(base), lora=LoraShape(rank=4), schedule=chosen, device="cpu", dtype="float32",
        max_length=128,
    )  # fmt: skip


def with_a_token_more(base: Path, folder: Path) -> Path:
    """A copy of a base whose tokenizer knows `<extra>`, for which the model has no embedding."""
    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    return folder
