"""What a folder of sentence-transformers says: how tokens become one vector, and how long a text may be."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from manylora.errors import ModelUnusable, quoted

__all__ = ["SentenceSettings", "sentence_settings"]

_MODULES: Final = "modules.json"
_SERVED: Final = ("Transformer", "Pooling", "Normalize")
# Its names of ways to pool, as switches and as one value, and ours.
_WAYS: Final[Mapping[str, Literal["cls", "last", "mean"]]] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "cls": "cls",
    "mean": "mean",
    "lasttoken": "last",
}


@dataclass(frozen=True, slots=True)
class SentenceSettings:
    """`pooling` and `max_tokens` are None where the folder does not say; `normalizes`: vectors get length 1."""

    pooling: Literal["cls", "last", "mean"] | None = None
    normalizes: bool = True
    max_tokens: int | None = None


def sentence_settings(folder: Path) -> SentenceSettings:
    """What `modules.json` and the files that it names say; nothing where there is none. Raises ModelUnusable."""
    if not (folder / _MODULES).is_file():
        return SentenceSettings()
    parts = _read(folder / _MODULES)
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise ModelUnusable(f"{folder / _MODULES} is no list of modules.")
    found = {str(part.get("type")).rpartition(".")[2]: str(part.get("path", "")) for part in parts}
    strange = sorted(found.keys() - set(_SERVED))
    if strange or found.get("Transformer", "") != "":
        raise ModelUnusable(
            f"{folder} is put together of parts that are not served: "
            f"{', '.join(quoted(each) for each in strange) or 'a transformer in a folder of its own'}. Served are a "
            "transformer in the folder itself, pooling and normalisation."
        )
    return SentenceSettings(
        pooling=_pooling(folder / found["Pooling"] / "config.json") if "Pooling" in found else None,
        normalizes="Normalize" in found,
        max_tokens=_max_tokens(folder / "sentence_bert_config.json"),
    )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelUnusable(f"{path} cannot be read as JSON: {error}") from error


def _pooling(path: Path) -> Literal["cls", "last", "mean"]:
    said = _read(path)
    switched = [name for name, value in said.items() if name.startswith("pooling_mode_") and value is True]
    chosen = [str(said["pooling_mode"])] if isinstance(said.get("pooling_mode"), str) else switched
    if len(chosen) != 1 or chosen[0] not in _WAYS:
        named = ", ".join(quoted(each) for each in chosen) or "nothing"
        raise ModelUnusable(f"{path} pools by {named}. Served are the first token, the last one, and the mean.")
    return _WAYS[chosen[0]]


def _max_tokens(path: Path) -> int | None:
    said = _read(path) if path.is_file() else {}
    value = said.get("max_seq_length") if isinstance(said, dict) else None
    return value if type(value) is int and value > 0 else None
