"""A training's curves for TensorBoard, Weights & Biases and MLflow, read back by their own packages where these are."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from manylora.errors import InvalidRequest
from manylora.lifecycle import trackers
from manylora.lifecycle.progress import Progress
from manylora.lifecycle.trackers import check_trackers, tracked
from manylora.lifecycle.train.config import TrainConfig, check
from manylora.lifecycle.train.train import train
from tests.lifecycle.helpers import label_rows, tiny_config, write_rows

SETTINGS = {"seed": 7, "lora": {"rank": 4, "targets": ("q_proj", "v_proj"), "alpha": None}}
# As a training tells them: what was evaluated after the second step stands until the fourth.
FIGURES = [
    {"loss": 1.0},
    {"loss": 0.5, "eval_loss": 0.7},
    {"loss": 0.4, "eval_loss": 0.7},
    {"loss": 0.2, "eval_loss": 0.6},
]
WANTED = {"loss": [(1, 1.0), (2, 0.5), (3, 0.4), (4, 0.2)], "eval_loss": [(2, 0.7), (4, 0.6)]}


def tell(names: list[str], folder: Path) -> list[Progress]:
    heard: list[Progress] = []
    with tracked(names, folder, "words", SETTINGS, heard.append) as listen:
        listen(Progress("warning", message="odd"))
        for step, values in enumerate(FIGURES, start=1):
            listen(Progress("train", step, len(FIGURES), values=values))
    return heard


def curves(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """What TensorBoard's own reader finds in the only run below the folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [events] = folder.rglob("events.out.tfevents.*")
    found = EventAccumulator(str(events.parent)).Reload()
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_tensorboard_draws_every_step_and_each_evaluation_once(tmp_path: Path) -> None:
    heard = tell(["tensorboard", "tensorboard"], tmp_path)
    assert [event.stage for event in heard] == ["warning", *["train"] * 4], "everything is passed on"
    found = curves(tmp_path)
    assert {name: [(s, pytest.approx(v)) for s, v in points] for name, points in WANTED.items()} == found
    tell(["tensorboard"], tmp_path / "again")
    assert not list(tmp_path.rglob("wandb"))


@pytest.mark.filterwarnings("ignore")  # of the package's own making
def test_mlflow_has_the_run_in_a_file(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    assert [event.stage for event in tell(["mlflow"], tmp_path)] == ["warning", *["train"] * 4]
    tell(["mlflow"], tmp_path)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("manylora")
    one, other = client.search_runs([experiment.experiment_id])
    assert one.info.status == other.info.status == "FINISHED"
    assert one.data.params == {"seed": "7", "lora.rank": "4", "lora.targets": "q_proj,v_proj"}
    for name, points in WANTED.items():
        assert [(m.step, m.value) for m in client.get_metric_history(one.info.run_id, name)] == points


def test_weights_and_biases_writes_a_run_that_was_never_sent(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    assert [event.stage for event in tell(["wandb"], tmp_path)] == ["warning", *["train"] * 4]
    [run] = tmp_path.rglob("offline-run-*/*.wandb")
    written = run.read_bytes()
    assert all(word in written for word in (b"eval_loss", b"lora.rank", b"q_proj,v_proj"))


def test_a_training_draws_its_curves_unless_it_was_not_asked_to(tmp_path: Path, tiny_llama_dir: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl", label_rows())
    config = replace(tiny_config(data, tmp_path / "out" / "words", tiny_llama_dir, epochs=1), eval_data=data)
    plain = train(config)
    assert not (tmp_path / "out" / "words.runs").exists()
    drawn = train(replace(config, report_to=("tensorboard",)), overwrite=True)
    assert drawn.report["settings"] == plain.report["settings"], "it changes nothing that comes out"
    found = curves(tmp_path / "out" / "words.runs" / "tensorboard")
    assert found["loss"] == [(step, pytest.approx(loss)) for step, loss in drawn.report["train_loss"]]
    assert found["eval_loss"] == [(step, pytest.approx(loss)) for step, loss in drawn.report["eval_loss"]]


class Broken:
    """A package whose disk is full from the second step on."""

    def __init__(self, *_: object) -> None:
        self.closed = False

    def log(self, step: int, _values: object) -> None:
        if step > 1:
            raise OSError(28, "No space left on device")

    def close(self, *, is_whole: bool) -> None:
        raise AssertionError("it was left out")


class Closed:
    """A package that notes in `ends` how its runs end."""

    ends: ClassVar[list[bool]] = []

    def __init__(self, *_: object) -> None: ...

    def log(self, *_: object) -> None: ...

    def close(self, *, is_whole: bool) -> None:
        self.ends.append(is_whole)


def test_a_training_that_is_stopped_ends_no_run_as_finished(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "_MADE", {"wandb": Closed})
    monkeypatch.setattr(trackers, "need", lambda *_: None)
    monkeypatch.setattr(Closed, "ends", [])
    data = write_rows(tmp_path / "train.jsonl", label_rows())
    config = replace(tiny_config(data, tmp_path / "out", tiny_llama_dir, epochs=1), report_to=("wandb",))
    assert not train(config, should_stop=lambda: True).finished
    assert train(config, resume=True).finished
    assert Closed.ends == [False, True]


def test_a_package_that_fails_is_left_out_and_the_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "_MADE", {**trackers._MADE, "wandb": Broken})
    monkeypatch.setattr(trackers, "need", lambda *_: None)
    heard = tell(["wandb", "tensorboard"], tmp_path)
    [warning] = [event.message for event in heard[1:] if event.stage == "warning"]
    assert warning.startswith("wandb cannot be written to: [Errno 28] No space left")
    assert len(curves(tmp_path)["loss"]) == 4
    assert math.isclose(heard[-1].values["loss"], 0.2)


def test_what_cannot_be_reported_to_is_said_before_any_work(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(write_rows(tmp_path / "train.jsonl", label_rows()), tmp_path / "out", base=str(tiny_llama_dir))
    with pytest.raises(InvalidRequest, match="`report_to` 'comet' is none of tensorboard, wandb, mlflow"):
        check(replace(config, report_to=("comet",)), overwrite=False, listen=lambda _: None)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(InvalidRequest, match="This needs mlflow"):
        check_trackers(["mlflow"])
