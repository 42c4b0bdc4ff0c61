"""Going on from an adapter: what it may be, the shape that the training has then, and its weights as they are."""

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from manylora.errors import InvalidRequest
from manylora.identity import CONFIG_FILE, TENSOR_FILE
from manylora.lifecycle.parameters import InvalidParameter
from manylora.lifecycle.train.config import LoraShape, TrainConfig
from manylora.lora.format.pairing import PREFIX, parse_name

__all__ = ["check_start", "going_on", "started"]

# What a config may say, first what it means where it does not: inits that leave the base's weights as they are, and no
# task but writing.
_PLAIN: Final[dict[str, tuple[Any, ...]]] = {
    "task_type": (None, "CAUSAL_LM"),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian"),
}
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
    found = check_start(config.start)
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


def check_start(folder: Path) -> dict[str, Any]:
    """The config of the adapter in the folder. Raises InvalidParameter for one that a training cannot go on from."""
    found = _read(folder)
    odd = [] if found.get("peft_type") == "LORA" else [f"peft_type {found.get('peft_type')}"]
    odd += [name for name in _MORE if found.get(name)]
    for name, plain in _PLAIN.items():
        if (value := found.get(name, plain[0])) not in plain:
            odd.append(f"{name} {value}")
    if odd:
        what = ", ".join(odd)[:200]
        raise InvalidParameter(f"`start` is no plain low-rank adapter ({what}), and only those are gone on from.")
    return found


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if (folder / TENSOR_FILE).is_file() and isinstance(found, dict):
            rank, alpha = found.get("r"), found.get("lora_alpha")
            if isinstance(rank, int) and isinstance(alpha, int | float):
                return found
    except (OSError, ValueError):
        pass
    raise InvalidParameter("`start` is no low-rank adapter in PEFT layout, whose config has r and lora_alpha.")


def started(model: Any, folder: Path, dropout: float) -> Any:
    """The base with the adapter's matrices, to be trained. Raises InvalidRequest where they are not this base's.

    Which modules they are on, its tensors say: PEFT would run whatever pattern the config has through `re`, where one
    can take years.
    """
    from peft import LoraConfig, PeftModel

    targets = _targets(model, folder)
    try:
        config = LoraConfig.from_pretrained(folder)
        config.base_model_name_or_path = model.name_or_path  # a name, which PEFT would look up in a hub
        config.lora_dropout, config.inference_mode, config.init_lora_weights = dropout, False, True
        config.target_modules = targets
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        wrapped = PeftModel.from_pretrained(model, folder, config=config, is_trainable=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise _misfit(str(error)) from error
    return wrapped


def _targets(model: Any, folder: Path) -> set[str]:
    """Names for the modules that the adapter's tensors are on, and no others of the model. Raises InvalidRequest."""
    try:
        with safe_open(folder / TENSOR_FILE, "pt") as file:
            names = list(file.keys())
    except SafetensorError as error:
        raise _misfit(str(error)) from error
    known = {path for path, _ in model.named_modules()}
    paths = set()
    for name in names:
        parsed = parse_name(name)
        if parsed is None or parsed.part in ("weight", "bias"):  # a copy of the base's own, which PEFT may save beside
            continue
        if not name.startswith(PREFIX) or parsed.path not in known:
            raise _misfit(f"there is no module for {name}")
        paths.add(parsed.path)
    if not paths:
        raise _misfit("none of its tensors is low rank")
    return _shortest(paths, known)


def _shortest(paths: set[str], known: Collection[str]) -> set[str]:
    """The paths' last parts, as a config usually has them, where these mean no other module; else the paths."""
    ends = {path.rpartition(".")[2] for path in paths}
    return ends if {path for path in known if path.rpartition(".")[2] in ends} == paths else paths


def _misfit(why: str) -> InvalidRequest:
    return InvalidRequest(f"The adapter to go on from does not fit this base: {why[:200]}")
