"""Adapters that are a head and nothing else: served in a batch with others as PEFT computes them, and trained."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from manylora.errors import InvalidRequest
from manylora.lifecycle.evaluate.command import run_evaluation
from manylora.lifecycle.evaluate.config import EvaluateRequest
from manylora.lifecycle.parameters import TrainTask
from manylora.lifecycle.train.config import LoraShape, Schedule, TrainConfig
from manylora.lifecycle.train.train import train
from tests.images.tiny import file_of, make_image_model, part_of, picture, url_of, wanted_scores
from tests.lifecycle.helpers import label_rows, write_rows

from .tiny import make_encoder, make_encoder_adapter, peft_model, serve

AUTO = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}
TEXT = [0, 7, 9, 30, 12, 2]


def make_head(base: Path, folder: Path, task: str, num_labels: int, *, seed: int = 0) -> Path:
    """Save what PEFT makes of a head with random weights and no module that is adapted."""
    torch.manual_seed(seed)
    model: Any = AUTO[task].from_pretrained(base, dtype=torch.float32, num_labels=num_labels)
    config = LoraConfig(task_type=task, target_modules="dummy-target-modules")
    get_peft_model(model, config).save_pretrained(folder)
    return folder


@torch.inference_mode()
def wanted(base: Path, folder: Path, task: str, num_labels: int) -> np.ndarray:
    model = peft_model(base, folder, model_class=AUTO[task], num_labels=num_labels)
    found: np.ndarray = model(input_ids=torch.tensor([TEXT])).logits[0].numpy()
    return found


def test_heads_alone_give_what_peft_gives_beside_adapters_with_matrices(tmp_path: Path) -> None:
    base = make_encoder("bert", tmp_path / "base")
    texts = make_head(base, tmp_path / "texts", "SEQ_CLS", 4, seed=1)
    words = make_head(base, tmp_path / "words", "TOKEN_CLS", 3, seed=2)
    usual = make_encoder_adapter(base, tmp_path / "usual", model_class=AUTO["SEQ_CLS"], task="SEQ_CLS", num_labels=3)
    with serve(base, tmp_path / "data") as served:
        for folder in (texts, words, usual):
            said = served.upload(folder, folder.name)
            assert said.status_code == 201, said.text
        shown = served.get("/v1/adapters/texts").json()
        assert (shown["versions"][0]["kind"], shown["versions"][0]["rank"]) == ("head", 0)
        bodies = [{"model": name, "input": [TEXT], "use_activation": False} for name in ("texts", "words", "usual")]
        ours, tagged, others = (each.json()["data"][0] for each in served.together("/v1/classify", bodies))
    np.testing.assert_allclose(ours["probs"], wanted(base, texts, "SEQ_CLS", 4), atol=1e-5)
    np.testing.assert_allclose(others["probs"], wanted(base, usual, "SEQ_CLS", 3), atol=1e-5)
    scores = [each["score"] for each in tagged["tokens"]]
    np.testing.assert_allclose(scores, wanted(base, words, "TOKEN_CLS", 3).max(-1), atol=1e-5)


def test_a_head_whose_config_names_modules_is_not_alone(tmp_path: Path) -> None:
    base = make_encoder("bert", tmp_path / "base")
    folder = make_encoder_adapter(
        base, tmp_path / "cut", model_class=AUTO["SEQ_CLS"], task="SEQ_CLS", targets=["query"]
    )
    file = folder / "adapter_model.safetensors"
    save_file({name: each for name, each in load_file(file).items() if "classifier" in name}, file)
    headless = make_head(base, tmp_path / "headless", "SEQ_CLS", 3)
    config = headless / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"task_type": "FEATURE_EXTRACTION"}))
    with serve(base, tmp_path / "data") as served:
        assert "missing_tensor" in served.upload(folder, "cut").text
        assert "unmatched_module" in served.upload(headless, "headless").text


def test_rank_0_trains_a_head_that_is_scored_and_served(tmp_path: Path) -> None:
    base = make_encoder("bert", tmp_path / "base")
    data = write_rows(tmp_path / "rows.jsonl", label_rows())
    config = TrainConfig(
        data=data, test_data=data, out=tmp_path / "out", base=str(base), task="classify", lora=LoraShape(rank=0),
        schedule=Schedule(epochs=6, batch_size=8, lr=5e-2), device="cpu", dtype="float32", threads=1,
    )  # fmt: skip
    done = train(config)
    losses = [loss for _, loss in done.report["train_loss"]]
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    assert done.report["num_parameters"] == 48 * 2 + 2
    assert set(load_file(done.out / "adapter_model.safetensors")) == {
        "base_model.model.classifier.weight", "base_model.model.classifier.bias",
    }  # fmt: skip
    assert "| Rank, alpha | 0: the head alone |" in (done.out / "README.md").read_text()
    request = EvaluateRequest(
        data=data, adapters=(str(done.out),), task="classify", model=str(base), device="cpu", dtype="float32"
    )
    report, _ = run_evaluation(request)
    accuracy = report["contenders"]["out"]["accuracy"]["value"]
    assert accuracy == done.report["scores"]["accuracy"]
    with serve(base, tmp_path / "data") as served:
        assert served.upload(done.out, "words").status_code == 201
        rows = label_rows()
        found = served.post("/v1/classify", model="words", input=[row["text"] for row in rows]).json()["data"]
    assert np.mean([a["label"] == b["label"] for a, b in zip(found, rows, strict=True)]) == pytest.approx(accuracy)


def test_rank_0_trains_a_head_over_images(tmp_path: Path) -> None:
    base = make_image_model("vit", tmp_path / "base")
    shown = [picture(seed) for seed in range(6)]
    rows = [{"image": url_of(file_of(each)), "label": "ab"[n % 2]} for n, each in enumerate(shown)]
    config = TrainConfig(
        data=write_rows(tmp_path / "rows.jsonl", rows), out=tmp_path / "out", base=str(base), task="image",
        lora=LoraShape(rank=0), schedule=Schedule(epochs=1, lr=1e-2), device="cpu", dtype="float32", threads=1,
    )  # fmt: skip
    done = train(config)
    with serve(base, tmp_path / "data") as served:
        assert served.upload(done.out, "ab").status_code == 201
        body = {"input": [part_of(file_of(each)) for each in shown], "use_activation": False}
        found = served.post("/v1/classify", model="ab", **body).json()["data"]
    np.testing.assert_allclose([each["probs"] for each in found], wanted_scores(base, done.out, 2, shown), atol=1e-5)


@pytest.mark.parametrize(
    ("task", "lora", "said"),
    [
        ("embed", LoraShape(rank=0), "`rank` must be positive, not 0"),
        ("classify", LoraShape(rank=0, targets=("query",)), "`targets` has no place beside `rank` 0"),
        ("classify", LoraShape(rank=-1), "`rank` must be positive, not -1"),
    ],
)
def test_rank_0_is_refused_where_it_leaves_nothing_to_learn(
    task: TrainTask, lora: LoraShape, said: str, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", label_rows())
    with pytest.raises(InvalidRequest, match=said):
        train(TrainConfig(data=data, out=tmp_path / "out", base=str(tmp_path), task=task, lora=lora))
