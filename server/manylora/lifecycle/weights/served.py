"""`manylora inspect` for the adapters that a running server holds."""

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from manylora.errors import InvalidAdapter
from manylora.lifecycle.weights.inspection import report_of
from manylora.lifecycle.weights.low_rank import Lora, read_lora
from manylora.lora.format.spec import ModuleSpec
from manylora.models.checkpoint import weight_files

__all__ = ["Inspector", "stored_norms"]

_DIGITS = 5


class Inspector:
    """Reports on adapters for one base. Thread-safe; calls block, and one runs at a time.

    `checkpoint` is the base's folder: the norms of its weights are read from there, each once, when the first
    adapter that targets it is looked at, so that a start costs nothing and the running model is not touched.
    """

    def __init__(self, checkpoint: Path, modules: Mapping[str, ModuleSpec]) -> None:
        self._checkpoint = checkpoint
        self._modules = modules
        self._norms: dict[str, float] = {}
        self._looked_up: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, folder: Path) -> dict[str, Any]:
        """`inspection.report_of` an adapter in PEFT layout, numbers at five digits.

        Of one made for another base, which this server keeps and does not serve, without norms of the base.
        """
        with self._lock:
            lora, norms = self._read(folder)
            report: dict[str, Any] = _rounded(report_of(folder.name, lora, norms))
        return report

    def _read(self, folder: Path) -> tuple[Lora, Mapping[str, float]]:
        try:
            lora = read_lora(folder, self._modules)
        except InvalidAdapter:
            return read_lora(folder), {}
        missing = lora.pairs.keys() - self._looked_up
        if missing:
            self._norms |= stored_norms(self._checkpoint, missing)
            self._looked_up |= missing
        return lora, self._norms


def stored_norms(checkpoint: Path, paths: Iterable[str]) -> dict[str, float]:
    """Frobenius norms of modules' weights, from a checkpoint's files, one tensor in memory at a time.

    A checkpoint may name tensors without the model's own prefix (`h.0.attn…` for `transformer.h.0.attn…`). A module
    whose weight it does not hold under its name (a tied one) is left out. Raises ModelUnusable.
    """
    wanted = {f"{path}.weight": path for path in paths}
    without_prefix = {name.partition(".")[2]: path for name, path in wanted.items()}
    norms: dict[str, float] = {}
    for file in weight_files(checkpoint):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                path = wanted.get(name) or without_prefix.get(name)
                if path is not None:
                    norms[path] = float(torch.linalg.vector_norm(tensors.get_tensor(name), dtype=torch.float32))
    return norms


def _rounded(value: Any) -> Any:
    """`value` with every float at five significant digits, which is more than a picture shows."""
    match value:
        case float():
            return float(f"{value:.{_DIGITS}g}")
        case dict():
            return {key: _rounded(item) for key, item in value.items()}
        case list():
            return [_rounded(item) for item in value]
        case _:
            return value
