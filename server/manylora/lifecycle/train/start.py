"""Going on from an adapter: what it may be, the shape that the training has then, and its weights as they are."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from manylora.errors import InvalidRequest
from manylora.identity import CONFIG_FILE, TENSOR_FILE
from manylora.lifecycle.parameters import InvalidParameter
from manylora.lifecycle.train.config import LoraShape, TrainConfig

__all__ = ["going_on", "started"]

_PLAIN_INITS: Final = (True, False, None, "gaussian")  # that leave the base's weights as they are
# Of a config, what is not low rank alone: PEFT would train it, and `rank` and the others could not say what it is.
_MORE: Final = (
    "alora_invocation_tokens", "alpha_pattern", "layer_replication", "modules_to_save", "rank_pattern",
    "target_parameters", "trainable_token_indices",
)  # fmt: skip


def going_on(config: TrainConfig) -> TrainConfig:
    """The training with the shape of the adapter in `start`. Raises InvalidParameter for one that cannot be used.

    The dropout is the training's own; the rest of the shape is the adapter's, so that nothing else may be said of it.
    """
    if config.start is None:
        return config
    if config.lora != LoraShape(dropout=config.lora.dropout):
        raise InvalidParameter("`start` brings the shape of its matrices along: of it only `dropout` can be said anew.")
    if config.method == "dpo":
        raise InvalidParameter("`start` does not go with `method` dpo, which compares with the base.")
    found = _read(config.start)
    odd = [name for name in _MORE if found.get(name)]
    is_plain = found.get("peft_type") == "LORA" and found.get("bias", "none") == "none"
    if not is_plain or odd or found.get("init_lora_weights", True) not in _PLAIN_INITS:
        what = ", ".join(odd) or f"{found.get('peft_type')}, init_lora_weights {found.get('init_lora_weights', True)}"
        raise InvalidParameter(f"`start` is no plain low-rank adapter ({what[:200]}), and only those are gone on from.")
    targets = found.get("target_modules") or ()
    shape = replace(
        config.lora,
        rank=int(found["r"]),
        alpha=float(found["lora_alpha"]),
        targets=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        rslora=bool(found.get("use_rslora")),
        dora=bool(found.get("use_dora")),
    )
    return replace(config, lora=shape)


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if (folder / TENSOR_FILE).is_file() and isinstance(found, dict) and {"r", "lora_alpha"} <= found.keys():
            return found
    except (OSError, ValueError):
        pass
    raise InvalidParameter(f"`start` {folder} is no low-rank adapter in PEFT layout.")


def started(model: Any, folder: Path, dropout: float) -> Any:
    """The base with the adapter's matrices, to be trained. Raises InvalidRequest where they are not this base's."""
    from peft import LoraConfig, PeftModel

    config = LoraConfig.from_pretrained(folder)
    config.base_model_name_or_path = model.name_or_path  # a name, which PEFT would look up in a hub
    config.lora_dropout, config.inference_mode, config.init_lora_weights = dropout, False, True
    try:
        wrapped = PeftModel.from_pretrained(model, folder, config=config, is_trainable=True)
    except (RuntimeError, ValueError) as error:
        raise InvalidRequest(f"The adapter to go on from does not fit this base: {str(error)[:200]}") from error
    return wrapped
