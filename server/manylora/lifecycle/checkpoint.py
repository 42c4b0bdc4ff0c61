"""A training's state on disk: tensors as safetensors, the rest as JSON; never pickle."""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from manylora.errors import InvalidRequest
from manylora.lifecycle.output import atomic_folder, write_json
from manylora.lifecycle.training import History, Trainer


def checkpoint_folder(out: Path) -> Path:
    """Beside the result, hidden, so that an interrupted training leaves nothing under the result's name."""
    return out.parent / f".{out.name}.checkpoint"


def save_checkpoint(folder: Path, trainer: Trainer, fingerprint: str) -> None:
    """Replace the checkpoint in `folder` by the trainer's state now. Raises ManyloraError when it cannot be written."""
    tensors: dict[str, torch.Tensor] = {"random": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in trainer.parameters.items():
        tensors[f"weight.{name}"] = parameter.detach().contiguous()
        tensors[f"best.{name}"] = trainer.best[name].contiguous()
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            tensors[f"adamw.{key}.{name}"] = torch.as_tensor(value).contiguous()
    history = asdict(trainer.history)
    history["best_loss"] = None if math.isinf(trainer.history.best_loss) else trainer.history.best_loss
    with atomic_folder(folder) as draft:
        try:
            save_file(tensors, draft / "state.safetensors")
        except SafetensorError as error:
            raise OSError(None, f"the checkpoint: {error}") from error
        write_json(draft / "state.json", {"fingerprint": fingerprint, "history": history})


def load_checkpoint(folder: Path, trainer: Trainer, fingerprint: str) -> None:
    """Put the trainer where the checkpoint was taken.

    Raises InvalidRequest when there is none, or when it belongs to other data or settings.
    """
    if not (folder / "state.json").is_file():
        raise InvalidRequest(f"There is nothing to resume: {folder} does not exist. Run without --resume.")
    state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state["fingerprint"] != fingerprint:
        raise InvalidRequest(
            "The interrupted training used other data or settings. Resume it with those, or start again with "
            "--overwrite."
        )
    tensors = load_file(folder / "state.safetensors")
    torch.set_rng_state(tensors["random"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    with torch.no_grad():
        for name, parameter in trainer.parameters.items():
            parameter.copy_(tensors[f"weight.{name}"])
            trainer.best[name] = tensors[f"best.{name}"].to(parameter.device)
            for key in ("step", "exp_avg", "exp_avg_sq"):
                stored = tensors.get(f"adamw.{key}.{name}")
                if stored is not None:
                    place = parameter.device if key != "step" else torch.device("cpu")
                    trainer.optimizer.state[parameter][key] = stored.to(place)
    history = state["history"]
    history["best_loss"] = math.inf if history["best_loss"] is None else history["best_loss"]
    history["train_loss"] = [(int(step), float(loss)) for step, loss in history["train_loss"]]
    history["eval_loss"] = [(int(step), float(loss)) for step, loss in history["eval_loss"]]
    trainer.history = History(**history)


def discard_checkpoint(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
