"""The base's weights as its checkpoint holds them, whatever number format the server keeps them in."""

import threading
from collections.abc import Mapping
from pathlib import Path

from manylora.lora.format import tensors as safetensors_file
from manylora.lora.format.encoders import EncoderModules
from manylora.lora.format.problems import Problems
from manylora.lora.format.spec import ModuleSpec
from manylora.lora.format.targets import output_head
from manylora.lora.format.tensors import TensorView
from manylora.models.checkpoint import weight_files

__all__ = ["StoredWeights"]


class StoredWeights:
    """Implements `lora.format.spec.BaseWeights` over a checkpoint's files, mapped when first asked. Thread-safe."""

    def __init__(self, folder: Path, modules: Mapping[str, ModuleSpec]) -> None:
        self._folder = folder
        self._head = output_head(modules)
        self._embedding = next((path for path, spec in modules.items() if spec.kind == "embedding"), None)
        self._before = f"{modules.prefix}." if isinstance(modules, EncoderModules) else ""
        self._tensors: dict[str, TensorView] | None = None
        self._lock = threading.Lock()

    def find(self, path: str, part: str) -> TensorView | None:
        """`part` is "weight" or "bias". A head without a weight of its own has the embedding's."""
        found = self._named(f"{path}.{part}")
        if found is None and part == "weight" and path == self._head and self._embedding is not None:
            found = self._named(f"{self._embedding}.weight")
        return found

    def _named(self, name: str) -> TensorView | None:
        """The tensor under its name, with the model's own prefix or without: `transformer.wte.weight`, `wte.weight`."""
        with self._lock:
            if self._tensors is None:
                self._tensors = self._mapped()
            names = (name, name.partition(".")[2], f"{self._before}{name}")
            return next((self._tensors[each] for each in names if each in self._tensors), None)

    def _mapped(self) -> dict[str, TensorView]:
        tensors: dict[str, TensorView] = {}
        for path in weight_files(self._folder):
            tensors |= safetensors_file.parse(safetensors_file.map_file(path), Problems()) or {}
        return tensors
