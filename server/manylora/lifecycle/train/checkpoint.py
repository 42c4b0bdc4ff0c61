"""A training's state on disk, in one safetensors file: tensors, and the rest as JSON in its header; never pickle.

One file, so that it is replaced in one rename: a process killed at any moment leaves the last whole checkpoint.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from manylora.lifecycle.output import atomic_file, safetensors_as_os_errors
from manylora.lifecycle.parameters import InvalidParameter
from manylora.lifecycle.train.training import History, Trainer

_RANDOM, _RANDOM_CUDA = "random", "random.cuda"
_OPTIMIZER = ("step", "exp_avg", "exp_avg_sq")


def save_checkpoint(path: Path, trainer: Trainer, fingerprint: str) -> None:
    """Replace the checkpoint by the trainer's state now. Raises ManyloraError when it cannot be written."""
    tensors: dict[str, torch.Tensor] = {_RANDOM: torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors[_RANDOM_CUDA] = torch.cuda.get_rng_state()
    for name, parameter in trainer.parameters.items():
        tensors[f"weight.{name}"] = parameter.detach().contiguous()
        tensors[f"best.{name}"] = trainer.best[name].contiguous()
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            tensors[f"adamw.{key}.{name}"] = torch.as_tensor(value).contiguous()
    history = asdict(trainer.history)
    history["best_loss"] = None if math.isinf(trainer.history.best_loss) else trainer.history.best_loss
    state = {"fingerprint": fingerprint, "history": json.dumps(history)}
    with atomic_file(path) as draft, safetensors_as_os_errors("the checkpoint"):
        save_file(tensors, draft, metadata=state)


def load_checkpoint(path: Path, trainer: Trainer, fingerprint: str) -> None:
    """Put the trainer where the checkpoint was taken.

    Raises InvalidRequest when it belongs to other data or settings, or cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state: dict[str, str] = file.metadata()
            _check(state, fingerprint)
            tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InvalidParameter(f"{path} cannot be read: {error}. Start again with `overwrite`.") from error
    torch.set_rng_state(tensors[_RANDOM])
    if _RANDOM_CUDA in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[_RANDOM_CUDA])
    with torch.no_grad():
        for name, parameter in trainer.parameters.items():
            parameter.copy_(tensors[f"weight.{name}"])
            trainer.best[name] = tensors[f"best.{name}"].to(parameter.device)
            for key in _OPTIMIZER:
                stored = tensors.get(f"adamw.{key}.{name}")
                if stored is not None:
                    place = parameter.device if key != "step" else torch.device("cpu")
                    trainer.optimizer.state[parameter][key] = stored.to(place)
    trainer.history = _history(state["history"])


def discard_checkpoint(path: Path) -> None:
    path.unlink(missing_ok=True)


def _check(state: dict[str, str], fingerprint: str) -> None:
    if state["fingerprint"] != fingerprint:
        raise InvalidParameter(
            "The interrupted training used other data or settings. Resume it with those, or start again with "
            "`overwrite`."
        )


def _history(text: str) -> History:
    values: dict[str, Any] = json.loads(text)
    values["best_loss"] = math.inf if values["best_loss"] is None else values["best_loss"]
    for key in ("train_loss", "eval_loss"):
        values[key] = [(int(step), float(loss)) for step, loss in values[key]]
    return History(**values)
