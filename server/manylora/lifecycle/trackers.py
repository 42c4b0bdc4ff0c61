"""A training's figures as files of TensorBoard, Weights & Biases and MLflow, for those who look at them there.

Each is written by its package's own client into a folder. Nothing is sent anywhere: not the figures, and not what these
packages tell their makers of their use. Whoever wants a run at wandb.ai sends it with `wandb sync`.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from manylora.lifecycle.extras import need
from manylora.lifecycle.parameters import InvalidParameter
from manylora.lifecycle.progress import Listener, Progress

__all__ = ["TRACKERS", "check_trackers", "tracked"]

_PROJECT: Final = "manylora"
_ODD: Final = re.compile(r"[^A-Za-z0-9._-]")
# An evaluation's figures, which later steps repeat until the next one.
_STANDING: Final = ("eval_", "valid_")
# What the packages would tell of their use and of errors; they read this when they are imported.
_SILENT: Final = {"DO_NOT_TRACK": "true", "MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}


class _Tracker(Protocol):
    """One run of one package, made of a folder, the run's name, and the settings of the training."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, *, is_whole: bool) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / name))
        self._writer.add_text("settings", "\n".join(f"    {key}: {value}" for key, value in settings.items()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, is_whole: bool) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        import wandb

        quiet = wandb.Settings(
            console="off", silent=True, save_code=False, disable_git=True, x_disable_meta=True, x_disable_stats=True
        )
        self._run = wandb.init(
            project=_PROJECT, name=name, dir=str(folder), mode="offline", config=dict(settings), settings=quiet
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, *, is_whole: bool) -> None:
        self._run.finish(exit_code=0 if is_whole else 1)


class _MLflow:
    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(f"sqlite:///{folder.resolve()}/mlflow.db")
        known = self._client.get_experiment_by_name(_PROJECT)
        artifacts = (folder / "artifacts").resolve().as_uri()
        of = known.experiment_id if known is not None else self._client.create_experiment(_PROJECT, artifacts)
        self._run = self._client.create_run(of, run_name=name).info.run_id
        for key, value in settings.items():
            self._client.log_param(self._run, key, value)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=step)

    def close(self, *, is_whole: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if is_whole else "KILLED")


_MADE: Final[Mapping[str, Callable[[Path, str, Mapping[str, Any]], _Tracker]]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
    "mlflow": _MLflow,
}
TRACKERS: Final = tuple(_MADE)


def check_trackers(names: Sequence[str]) -> None:
    """Raises InvalidParameter for a name that is none of `TRACKERS`, InvalidRequest where a package is missing."""
    for name in names:
        if name not in _MADE:
            raise InvalidParameter(f"`report_to` {name!r:.80} is none of {', '.join(TRACKERS)}.")
    if names:
        os.environ.update(_SILENT)
        need(*names)


@contextmanager
def tracked(
    names: Sequence[str],
    folder: Path,
    title: str,
    settings: Mapping[str, Any],
    listen: Listener,
    has_finished: Callable[[], bool] = lambda: True,
) -> Iterator[Listener]:
    """A listener that passes everything on to `listen`, and writes the figures of steps for each of the packages.

    `folder` gets a folder of each. A package that fails is told of as a warning and left out from then on: a training
    is worth more than its curves. At the end, `has_finished` says whether the run is whole, or was stopped before its
    end. Raises what `check_trackers` does.
    """
    check_trackers(names)
    if not names:
        yield listen
        return
    runs = _Runs(listen)
    plain = _ODD.sub("-", title)  # which names a folder, and may come from a server
    runs.begin(names, folder, f"{plain}-{time.strftime('%Y%m%d-%H%M%S')}", dict(_flat(settings)))
    is_whole = False
    try:
        yield runs.hear
        is_whole = has_finished()
    finally:
        runs.end(is_whole=is_whole)


class _Runs:
    """One run of each package that has not failed yet."""

    def __init__(self, listen: Listener) -> None:
        self._listen = listen
        self._open: dict[str, _Tracker] = {}
        self._last: dict[str, float] = {}

    def begin(self, names: Sequence[str], folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        for which in dict.fromkeys(names):
            with self._warned(which):
                (folder / which).mkdir(parents=True, exist_ok=True)
                self._open[which] = _MADE[which](folder / which, name, settings)

    def hear(self, event: Progress) -> None:
        self._listen(event)
        if event.stage != "train":
            return
        values = {name: value for name, value in event.values.items() if not self._stands(name, value)}
        self._last = dict(event.values)
        for which, run in list(self._open.items()):
            with self._warned(which):
                run.log(event.done, values)

    def end(self, *, is_whole: bool) -> None:
        for which, run in list(self._open.items()):
            with self._warned(which):
                run.close(is_whole=is_whole)

    def _stands(self, name: str, value: float) -> bool:
        return name.startswith(_STANDING) and self._last.get(name) == value

    @contextmanager
    def _warned(self, which: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - these packages raise anything
            self._open.pop(which, None)
            said = " ".join(str(error).split())[:200] or type(error).__name__
            message = f"{which} cannot be written to: {said}. The training goes on without it."
            self._listen(Progress("warning", message=message))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            yield prefix + name, ",".join(map(str, value))
        elif value is not None:
            yield prefix + name, value
