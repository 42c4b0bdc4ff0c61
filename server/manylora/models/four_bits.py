"""GPTQ and AWQ checkpoints of 4 bits become plain ones: read once, kept in the cache in their scales' number format.

Their integers are not lost by that. A weight that has 16 steps in each group is recognised when the server rounds it to
4 bits itself (`kernels.weights.pack_int4`), and with `--quantization int4` it gets the same ones back.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from manylora.errors import ModelUnusable
from manylora.models import checkpoint
from manylora.models.model_cache import ModelCache, file_digest
from manylora.models.stages import Stages

__all__ = ["ensure_plain", "is_four_bits"]

# Raised when the same checkpoint is made into something else, so that what is in the caches is made anew.
_VERSION: Final = 2
_PARTS: Final = ("qweight", "qzeros", "scales", "g_idx")
_IN_WORD: Final = 8  # of 4 bits in 32
_ONES: Final = 0x11111111  # one in each of them
# Which of eight columns each half byte of an AWQ word is, from the lowest on.
_AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)


def is_four_bits(folder: Path) -> bool:
    """Whether a checkpoint's config says that it is one of those that `ensure_plain` reads. Raises ModelUnusable."""
    return _reader(checkpoint.config_json(folder)) is not None


def ensure_plain(folder: Path, cache: ModelCache) -> Path:
    """The folder of the same model with whole weights, found again by the files' content. Raises ModelUnusable."""
    with Stages() as stages:
        files = checkpoint.weight_files(folder)
        with stages.step(f"Reading {folder.name}"):
            digests = [file_digest(path) for path in (folder / "config.json", *files)]
        digest = hashlib.sha256("".join(digests).encode()).hexdigest()

        def build(target: Path) -> None:
            with stages.step(f"Unpacking {folder.name}"):
                _unpack(folder, files, target)

        return cache.get(f"four-bits-{digest[:24]}-{_VERSION}", build)


def _reader(config: dict[str, Any]) -> "Callable[[dict[str, torch.Tensor]], torch.Tensor] | None":
    """What makes a weight [out, in] of a module's tensors; None where the config names no method known here."""
    said = config.get("quantization_config")
    if not isinstance(said, dict) or said.get("bits", said.get("w_bit")) != 4:
        return None
    if said.get("quant_method") == "gptq":
        # Zero points are stored less one, but in its second format. It is words that ones are taken from: a zero point
        # of 0 borrows from the one beside it, and the last of a word wraps around.
        added = 0 if said.get("checkpoint_format") == "gptq_v2" else _ONES
        return lambda parts: _gptq(parts, added)
    is_awq = said.get("quant_method") == "awq" and str(said.get("version", "gemm")).lower() == "gemm"
    return _awq if is_awq else None


def _unpack(folder: Path, files: list[Path], target: Path) -> None:
    """Write every file with whole weights in place of packed ones, one after the other."""
    config = checkpoint.config_json(folder)
    reader = _reader(config)
    assert reader is not None
    where = {name: path for path in files for name in checkpoint.names_in(path)}
    if not any(name.endswith(".qweight") for name in where):
        method = config["quantization_config"]["quant_method"]
        raise ModelUnusable(f"{folder} says that it is quantised with {method}, and has no packed weights.")
    weight_map: dict[str, str] = {}
    for path in files:
        found = dict(_tensors(path, where, reader))
        weight_map |= dict.fromkeys(found, path.name)
        save_file(found, target / path.name, metadata={"format": "pt"})
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    taken = {"config.json", checkpoint.INDEX, *(path.name for path in files)}
    if (folder / checkpoint.INDEX).is_file():
        index = {"metadata": {}, "weight_map": weight_map}
        (target / checkpoint.INDEX).write_text(json.dumps(index), encoding="utf-8")
    for path in folder.iterdir():
        if path.name not in taken and path.suffix in (".json", ".jinja", ".model", ".txt") and path.is_file():
            shutil.copyfile(path, target / path.name)


def _tensors(
    path: Path, where: dict[str, Path], reader: Callable[[dict[str, torch.Tensor]], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """A file's tensors, packed ones as the weights that they stand for."""
    for name in checkpoint.names_in(path):
        module, _, part = name.rpartition(".")
        is_packed = f"{module}.qweight" in where
        if part == "qweight":
            parts = {each: _read(where[f"{module}.{each}"], f"{module}.{each}") for each in _PARTS
                     if f"{module}.{each}" in where}  # fmt: skip
            try:
                weight = reader(parts)
            except (KeyError, RuntimeError, IndexError) as error:
                raise ModelUnusable(f"The packed weight of {module[:200]} in {path} is not usable: {error}.") from error
            yield f"{module}.weight", weight
        elif not (is_packed and part in _PARTS):
            yield name, _read(path, name)


def _read(path: Path, name: str) -> torch.Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor
    except (SafetensorError, OSError) as error:
        raise ModelUnusable(f"{path} is no whole safetensors file: {error}. Fetch the checkpoint again.") from error


def _gptq(parts: dict[str, torch.Tensor], added: int) -> torch.Tensor:
    """qweight int32 [in / 8, out], qzeros int32 [groups, out / 8], scales [groups, out], g_idx int32 [in] or none.

    `added`: to each word of zero points.
    """
    integers = _nibbles(parts["qweight"]).transpose(1, 2).flatten(0, 1)  # [in, out]
    zeros = _nibbles(parts["qzeros"] + added).flatten(1)
    scales = parts["scales"]
    group = parts["g_idx"].long() if "g_idx" in parts else _even_groups(len(integers), len(scales))
    return ((integers - zeros[group]) * scales[group].float()).T.to(scales.dtype).contiguous()


def _awq(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales [groups, out]."""
    order = torch.tensor(_AWQ_ORDER).argsort()
    integers, zeros = (_nibbles(parts[name])[:, :, order].flatten(1) for name in ("qweight", "qzeros"))
    scales = parts["scales"]
    group = _even_groups(len(integers), len(scales))
    return ((integers - zeros[group]) * scales[group].float()).T.to(scales.dtype).contiguous()


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """[rows, columns] of 32 bits -> float32 [rows, columns, 8], the lowest half byte first."""
    shifts = torch.arange(0, 4 * _IN_WORD, 4, dtype=torch.int32)
    return (words[:, :, None] >> shifts & 15).float()


def _even_groups(num_inputs: int, num_groups: int) -> torch.Tensor:
    """Each input's group, of groups of one size."""
    if not num_groups or num_inputs % num_groups:
        raise RuntimeError(f"{num_inputs} inputs are no whole groups, of which there are {num_groups}")
    return torch.arange(num_inputs) // (num_inputs // num_groups)
