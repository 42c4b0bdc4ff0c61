"""`train --task classify`: a head of labels over an encoder and a decoder, whose labels a server then gives."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from manylora.errors import InvalidRequest
from manylora.lifecycle.data.data import read_dataset
from manylora.lifecycle.parameters import InvalidParameter
from manylora.lifecycle.progress import Progress
from manylora.lifecycle.tasks.labels import TextEncoder
from manylora.lifecycle.train.config import LoraShape, Schedule, TrainConfig
from manylora.lifecycle.train.train import train
from tests.encoders.tiny import make_encoder, serve

WORDS = {"praise": ["lovely", "superb"], "blame": ["awful", "broken"], "fact": ["tuesday", "metre"]}
FILLING = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then", "it", "sat", "down"]


def write_rows(path: Path, count: int, seed: int) -> Path:
    """Sentences of which one word says the label."""
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        label = list(WORDS)[number % 3]
        words = [*chance.sample(FILLING, chance.randint(2, 6)), chance.choice(WORDS[label])]
        chance.shuffle(words)
        rows.append({"text": " ".join(words), "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(base: Path, folder: Path, **more: Any) -> TrainConfig:
    return TrainConfig(
        data=write_rows(folder / "train.jsonl", 180, 1),
        eval_data=write_rows(folder / "test.jsonl", 48, 2),
        out=folder / "adapter",
        base=str(base),
        task="classify",
        lora=LoraShape(rank=8),
        schedule=Schedule(epochs=8, batch_size=12, lr=1e-2),
        dtype="float32",
        device="cpu",
        threads=1,
        **more,
    )


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_server_gives_the_labels_that_training_scored(kind: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    base = tiny_llama_dir if kind == "llama" else make_encoder(kind, tmp_path / "base")
    config = config_of(base, tmp_path)
    told: list[Progress] = []
    done = train(replace(config, test_data=write_rows(tmp_path / "last.jsonl", 36, 3)), listen=told.append)
    scores = done.report["scores"]
    assert scores["accuracy"] > 0.8, "labels that a word decides are learnt"
    assert any("accuracy" in each.message for each in told if each.stage == "scores" and "`test_data`" in each.message)
    assert list(scores["f1"]) == done.report["labels"] == sorted(WORDS)
    assert sum(map(sum, scores["confusion"])) == scores["num_examples"] == 36
    assert done.report["num_eval_examples"] == 48
    assert "Held-out accuracy" in (config.out / "README.md").read_text()

    with serve(base, tmp_path / "data", **({"kv_cache_memory": 2**24} if kind == "llama" else {})) as served:
        said = served.upload(config.out, "tone")
        assert said.status_code == 201, said.text
        assert said.json()["report"]["head"]["labels"] == sorted(WORDS)
        rows = [json.loads(line) for line in (tmp_path / "last.jsonl").read_text().splitlines()]
        answer = served.post("/v1/classify", model="tone", input=[row["text"] for row in rows]).json()["data"]
    right = sum(entry["label"] == row["label"] for entry, row in zip(answer, rows, strict=True))
    assert right == round(scores["accuracy"] * 36)


@pytest.mark.parametrize(
    ("more", "named"),
    [({"render": "plain"}, "render"), ({"instruction": "x"}, "instruction"), ({"sample": 2}, "sample")],
)
def test_what_says_how_a_prompt_is_written_is_refused(more: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match=f"`{named}` has no place"):
        train(config_of(tmp_path, tmp_path, **more))


def test_rows_to_score_are_of_the_labels_that_are_learnt(tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "x", "label": "rumour"}\n')
    config = config_of(tmp_path, tmp_path)
    with pytest.raises(InvalidParameter, match="`test_data` has labels that `data` lacks: rumour"):
        train(replace(config, test_data=other))
    with pytest.raises(InvalidParameter, match="`test_data` is scored by the tasks"):
        train(replace(config, test_data=other, task="generate"))


def test_rows_without_labels_are_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, tmp_path)
    config.data.write_text('{"prompt": "1+1=", "completion": "2"}\n')
    with pytest.raises(InvalidRequest, match="rows of text and label"):
        train(config)


def test_a_text_that_is_too_long_is_cut_at_its_end_within_its_special_tokens(tmp_path: Path) -> None:
    base = make_encoder("bert", tmp_path / "base")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "dog " * 99, "label": "a"}) + "\n" + '{"text": "x", "label": "b"}\n')
    long, short = TextEncoder(str(base), max_length=20).encode(read_dataset(path))
    assert (len(long), long.ids[0], long.ids[-1], short.num_cut) == (20, 0, 2, 0)
    assert long.num_cut > 0
