"""A command says what it needs before it works, and a picture that cannot be drawn costs nobody the work."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from manylora.errors import InvalidRequest
from manylora.lifecycle import extras
from manylora.lifecycle.evaluate import evaluate as evaluating
from manylora.lifecycle.evaluate.command import run_evaluation
from manylora.lifecycle.evaluate.config import EvaluateRequest
from manylora.lifecycle.output import report_folder
from manylora.lifecycle.progress import Progress
from manylora.lifecycle.train import choose_rank as choosing
from manylora.lifecycle.train import train as training
from manylora.lifecycle.train.choose_rank import choose_rank, ranks_folder
from manylora.lifecycle.train.config import ChooseConfig, TrainConfig
from manylora.lifecycle.train.train import train
from manylora.lifecycle.weights import inspection
from tests.lifecycle.helpers import label_rows, tiny_config, write_rows
from tests.tiny_adapters import make_adapter


@pytest.fixture
def config(tmp_path: Path, tiny_llama_dir: Path) -> TrainConfig:
    made = tiny_config(write_rows(tmp_path / "train.jsonl", label_rows()), tmp_path / "out" / "words", tiny_llama_dir)
    return replace(made, schedule=replace(made.schedule, epochs=1))


def request_of(config: TrainConfig, tmp_path: Path) -> EvaluateRequest:
    adapter = make_adapter(Path(str(config.base)), tmp_path / "adapter", rank=2)
    return EvaluateRequest(
        data=config.data, adapters=(str(adapter),), with_base=True, out=tmp_path / "scores", model=str(config.base),
        device="cpu", dtype="float32", max_tokens=2,
    )  # fmt: skip


def commands(config: TrainConfig, tmp_path: Path) -> dict[str, Callable[[list[Progress]], Any]]:
    return {
        "train": lambda told: train(config, listen=told.append),
        "choose_rank": lambda told: choose_rank(ChooseConfig(config, (1,), 2), listen=told.append),
        "evaluate": lambda told: run_evaluation(request_of(config, tmp_path), told.append),
    }


@pytest.mark.parametrize(
    ("command", "module", "package"),
    [
        ("train", "matplotlib", "matplotlib"),
        ("train", "peft", "peft"),
        ("choose_rank", "matplotlib", "matplotlib"),
        ("choose_rank", "sklearn", "scikit-learn"),
        ("evaluate", "matplotlib", "matplotlib"),
        ("evaluate", "sklearn", "scikit-learn"),
        ("evaluate", "peft", "peft"),
    ],
)
def test_what_is_missing_is_said_before_the_work(
    command: str, module: str, package: str, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = commands(config, tmp_path)[command]
    if command == "evaluate":
        request_of(config, tmp_path)  # PEFT makes the adapter
        monkeypatch.setitem(globals(), "make_adapter", lambda *_, **__: tmp_path / "adapter")
    monkeypatch.setitem(sys.modules, module, None)
    told: list[Progress] = []

    with pytest.raises(InvalidRequest, match=rf"needs {package}.* -m pip install '?{package}"):
        run(told)

    assert told == []
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_pictures_are_drawn(config: TrainConfig, tmp_path: Path) -> None:
    told: list[Progress] = []

    for run in commands(config, tmp_path).values():
        run(told)

    drawn = {path.name for path in tmp_path.rglob("*.png")}
    assert {"loss.png", "ranks.png", "confusion-base.png"} <= drawn
    assert not [event.message for event in told if "drawn" in event.message]


def broken(*_: object, **__: object) -> None:
    raise RuntimeError("no font\nat all")


@pytest.mark.parametrize("command", ["train", "choose_rank", "evaluate"])
def test_a_picture_that_fails_is_a_warning_and_the_result_is_whole(
    command: str, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((training, "loss_curve"), (choosing, "rank_curve"), (evaluating, "confusion_matrix")):
        monkeypatch.setattr(module, name, broken)
    results = {
        "train": [config.out / "adapter_model.safetensors", report_folder(config.out) / "train.json"],
        "choose_rank": [ranks_folder(config.out) / "ranks.json"],
        "evaluate": [tmp_path / "scores" / "evaluate.json"],
    }
    told: list[Progress] = []

    commands(config, tmp_path)[command](told)

    assert all(path.is_file() for path in results[command])
    warnings = {event.message for event in told if event.stage == "warning"}
    assert any("could not be drawn: no font at all. The result is whole" in message for message in warnings)


def test_a_report_is_kept_without_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "heat_map", broken)
    told: list[Progress] = []

    inspection.draw({"modules": {}}, tmp_path / "pictures", listen=told.append)

    assert json.loads((tmp_path / "pictures" / "inspect.json").read_text()) == {"modules": {}}
    assert "could not be drawn" in told[0].message


def test_everything_that_is_missing_is_named_at_once() -> None:
    with pytest.raises(InvalidRequest, match="needs nowhere_a and nowhere_b,"):
        extras.need("json", "nowhere_a", "nowhere_b")
