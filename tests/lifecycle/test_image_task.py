"""`train --task image`: labels of images, out of folders and rows, are what a server answers and PEFT computes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from manylora.errors import InvalidRequest
from manylora.lifecycle.data.data import read_dataset
from manylora.lifecycle.evaluate.command import run_evaluation
from manylora.lifecycle.evaluate.config import EvaluateRequest
from manylora.lifecycle.progress import Progress
from manylora.lifecycle.tasks import images
from manylora.lifecycle.train.choose_rank import choose_rank
from manylora.lifecycle.train.config import ChooseConfig, LoraShape, Schedule, TrainConfig
from manylora.lifecycle.train.train import train
from tests.encoders.tiny import make_encoder, serve
from tests.images.tiny import file_of, make_image_model, part_of, url_of, wanted_scores
from tests.lifecycle.helpers import write_rows

COLOURS = {"blue": (30, 40, 220), "red": (220, 40, 30)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_model("vit", tmp_path_factory.mktemp("base") / "vit")


def coloured(label: str, seed: int) -> Image.Image:
    """A picture of noise around a colour."""
    noise = np.random.default_rng(seed).normal(0, 50, (40, 30, 3))
    return Image.fromarray((np.array(COLOURS[label]) + noise).clip(0, 255).astype(np.uint8))


def folder_of(path: Path, count: int, first: int) -> Path:
    """Images in a folder for each label, and a file that is none."""
    for label in COLOURS:
        (path / label).mkdir(parents=True)
        for number in range(count):
            kind = ("PNG", "JPEG")[number % 2]
            data = file_of(coloured(label, first + number), kind)
            (path / label / f"{number:02}.{kind.lower()}").write_bytes(data)
    (path / "red" / "Thumbs.db").write_bytes(b"\0")
    return path


def config_of(base: Path, data: Path, out: Path, **more: Any) -> TrainConfig:
    return TrainConfig(
        data=data, out=out, base=str(base), task="image", lora=LoraShape(rank=4),
        schedule=Schedule(epochs=3, batch_size=8, lr=1e-2), dtype="float32", device="cpu", threads=1, **more,
    )  # fmt: skip


def test_images_get_the_labels_that_training_scored_and_peft_computes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_KEPT_BYTES", 10 * 32 * 32 * 3 * 4)  # so that most are read again
    data, test = folder_of(tmp_path / "train", 12, 0), folder_of(tmp_path / "test", 6, 100)
    told: list[Progress] = []
    done = train(config_of(base, data, tmp_path / "colours", test_data=test), listen=told.append)
    assert not [each.message for each in told if each.stage == "warning"], "files of one name in two folders differ"
    assert done.report["scores"]["accuracy"] == 1
    assert done.report["labels"] == ["blue", "red"]

    request = EvaluateRequest(
        data=test, adapters=(str(done.out),), task="image", model=str(base), device="cpu", dtype="float32"
    )
    report, _ = run_evaluation(request)
    assert report["contenders"]["colours"]["accuracy"]["value"] == 1

    shown = [coloured(label, seed) for seed in range(200, 203) for label in COLOURS]
    wanted = wanted_scores(base, done.out, 2, shown)
    with serve(base, tmp_path / "data") as served:
        said = served.upload(done.out, "colours")
        assert said.status_code == 201, said.text
        body = {"input": [part_of(file_of(each)) for each in shown], "use_activation": False}
        found = served.post("/v1/classify", model="colours", **body).json()["data"]
    assert [each["label"] for each in found] == ["blue", "red"] * 3
    np.testing.assert_allclose([each["probs"] for each in found], wanted, atol=1e-5)


def test_rows_name_files_beside_them_or_hold_images(base: Path, tmp_path: Path) -> None:
    folder_of(tmp_path / "files", 8, 0)
    rows = [{"image": f"files/{label}/{n:02}.{'jpeg' if n % 2 else 'png'}", "label": label} for n in range(8)
            for label in COLOURS]  # fmt: skip
    held = [{"image": url_of(file_of(coloured(row["label"], n % 8))), "label": row["label"]}
            for n, row in enumerate(rows)]  # fmt: skip
    named = write_rows(tmp_path / "named.jsonl", rows)
    training = config_of(base, write_rows(tmp_path / "held.jsonl", held), tmp_path / "out")
    report, _ = choose_rank(ChooseConfig(training, ranks=(1, 2), folds=2))
    assert report is not None
    assert report["score"] == "held-out loss in nats per label"
    assert all(each["mean"] < report["base_loss"] for each in report["candidates"])
    whole = b"".join([named.read_bytes(), *((tmp_path / row["image"]).read_bytes() for row in rows)])
    assert b"".join(read_dataset(named).contents()) == whole, "what a checkpoint and a digest are of"
    data = read_dataset(tmp_path / "files")
    assert [(each.label, Path(each.messages[0].content).name) for each in data.examples[:2]] == [
        ("blue", "00.png"), ("blue", "01.jpeg"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "gone.png"}, "row 1: gone.png cannot be read: No such file"),
        ({"image": "train.jsonl"}, "row 1: The image is none"),
        ({"image": "data:image/png,abc"}, "row 1: A data URL must have its data in base64"),
        ({"image": "a\0b.png"}, "cannot be read"),
        ({"image": " "}, "image is empty"),
        ({"image": "a.png", "label": 3}, "label must be a string"),
    ],
)
def test_a_row_without_an_image_is_refused_by_its_number(
    row: dict[str, Any], said: str, base: Path, tmp_path: Path
) -> None:
    rows = [{"label": "a", **row}, {"image": url_of(file_of(coloured("red", 0))), "label": "b"}]
    with pytest.raises(InvalidRequest, match=said):
        train(config_of(base, write_rows(tmp_path / "train.jsonl", rows), tmp_path / "out"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"max_length": 12}, "`max_length` has no place in `task` image"),
        ({"lora": LoraShape(trained_tokens=("a",))}, "`trained_tokens` has no place"),
        ({"task": "classify"}, "takes rows of text and label"),
        ({"base": "texts"}, "takes an encoder of images"),
    ],
)
def test_what_images_have_no_place_for_is_refused(more: dict[str, Any], said: str, base: Path, tmp_path: Path) -> None:
    if "base" in more:
        more = {"base": str(make_encoder("bert", tmp_path / "texts"))}
    given = {"base": str(base), "task": "image", "out": tmp_path / "out", **more}
    with pytest.raises(InvalidRequest, match=said):
        train(TrainConfig(data=folder_of(tmp_path / "train", 2, 0), **given))


def test_a_folder_of_no_images_says_what_it_may_hold(tmp_path: Path) -> None:
    (tmp_path / "train" / "red" / "deeper").mkdir(parents=True)
    with pytest.raises(InvalidRequest, match="or a folder of images for each label"):
        read_dataset(tmp_path / "train")


def test_a_head_that_cannot_be_served_is_not_trained(tmp_path: Path) -> None:
    """Transformers has no class with labels for CLIP's tower."""
    tower = make_image_model("clip", tmp_path / "base", processor="clip")
    with pytest.raises(InvalidRequest, match="heads over this base are not served"):
        train(config_of(tower, folder_of(tmp_path / "train", 2, 0), tmp_path / "out"))
    assert json.loads((tower / "config.json").read_text())["model_type"] == "clip_vision_model"
