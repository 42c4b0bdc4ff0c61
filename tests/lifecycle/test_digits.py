"""`cases/images/digits.py`: an encoder is made, an adapter learns digits that it has never seen, and is served."""

import json
import runpy
from pathlib import Path

import numpy as np

from manylora.lifecycle.train.config import LoraShape, Schedule, TrainConfig
from manylora.lifecycle.train.train import train
from tests.encoders.tiny import serve

SCRIPT = Path(__file__).parents[2] / "cases" / "images" / "digits.py"


def test_digits_that_the_base_has_never_seen_are_learnt_by_an_adapter(tmp_path: Path) -> None:
    runpy.run_path(str(SCRIPT))["make"](tmp_path)
    config = TrainConfig(
        data=tmp_path / "train.jsonl", test_data=tmp_path / "test.jsonl", out=tmp_path / "new",
        base=str(tmp_path / "base"), task="image", lora=LoraShape(rank=4),
        schedule=Schedule(epochs=12, batch_size=16, lr=1e-2), dtype="float32", device="cpu", threads=1,
    )  # fmt: skip
    scores = train(config).report["scores"]
    assert scores["accuracy"] > 0.8, "of four digits"
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    with serve(tmp_path / "base", tmp_path / "data") as served:
        assert served.upload(tmp_path / "new", "new").status_code == 201
        found = []
        for start in range(0, len(rows), 64):
            asked = [row["image"] for row in rows[start : start + 64]]
            answer = served.post("/v1/classify", model="new", input=asked).json()
            found += [each["label"] for each in answer["data"]]
    right = np.mean([label == row["label"] for label, row in zip(found, rows, strict=True)])
    assert abs(right - scores["accuracy"]) < 1e-9
