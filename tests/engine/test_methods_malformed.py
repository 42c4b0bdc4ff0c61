"""Files of PEFT's methods that were changed by hand: refused with their problems, or served; never a fault."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from manylora.errors import InvalidAdapter
from manylora.identity import CONFIG_FILE, TENSOR_FILE
from manylora.lora.format.reader import Adapter, read, read_trusted
from manylora.lora.memory.packing import pack
from manylora.models.wrapping import WrappedModel
from tests.engine.harness import build_rig, load
from tests.peft_kinds import KINDS, REFUSED, make_kind

SERVED = [name for name in KINDS if name not in REFUSED]
ONE_OF_EACH_METHOD = list({KINDS[name].method: name for name in SERVED}.values())
VALUES: tuple[Any, ...] = (-1, 3, 10**9, "x", None, [10**9])
# Of what does not decide what an adapter computes.
LEFT_ALONE = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "peft_type"}


@pytest.fixture(scope="module")
def wrapped(tiny_llama_dir: Path) -> WrappedModel:
    rig = build_rig(load(tiny_llama_dir))
    rig.close()
    return rig.wrapped


@pytest.fixture
def made(request: pytest.FixtureRequest, tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return make_kind(tiny_llama_dir, tmp_path / "made", request.param)


def cut(array: np.ndarray, dim: int) -> np.ndarray:
    return np.ascontiguousarray(np.delete(array, -1, axis=dim))


def changed_tensors(tensors: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """One tensor of each sort is gone, another size, another dimension, another type, or not finite."""
    sorts: dict[str, str] = {}
    for name in tensors:
        sorts.setdefault(".".join(piece for piece in name.split(".")[-3:] if not piece.isdigit()), name)
    for name in sorts.values():
        array = tensors[name]
        rest = {other: value for other, value in tensors.items() if other != name}
        yield rest
        yield rest | {name.replace("layers.0", "layers.9"): array}
        for dim in range(array.ndim):
            yield rest | {name: cut(array, dim)}
        yield rest | {name: array[None]}
        yield rest | {name: array.ravel()[:0]}
        yield rest | {name: array.astype(np.float64)}
        yield rest | {name: (np.full_like(array, np.nan) if array.dtype.kind == "f" else np.full_like(array, 200))}
        if array.dtype.kind == "i":
            yield rest | {name: np.full_like(array, -1)}


def tries(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], wrapped: WrappedModel) -> bool:
    """Whether it is taken; then it can be packed too, and has the sizes that were checked."""
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    save_file(tensors, folder / TENSOR_FILE)
    is_taken = False
    with suppress(InvalidAdapter):
        packed(read(folder, wrapped.modules, max_rank=64, max_size=2**24, max_memory=2**24), wrapped)
        is_taken = True
    # What is stored is not read with all checks again, and is out of bounds in no case.
    with suppress(InvalidAdapter):
        packed(read_trusted(folder, wrapped.modules), wrapped)
    return is_taken


def packed(adapter: Adapter, wrapped: WrappedModel) -> None:
    assert pack(adapter, wrapped.sites, torch.float32, base=wrapped.served.__getitem__).data.numel()


@pytest.mark.parametrize("made", ONE_OF_EACH_METHOD, indirect=True)
def test_a_changed_tensor_is_a_problem_and_no_fault(made: Path, wrapped: WrappedModel, tmp_path: Path) -> None:
    config, tensors = json.loads((made / CONFIG_FILE).read_text()), load_file(made / TENSOR_FILE)
    assert tries(tmp_path / "as-made", config, tensors, wrapped)
    taken = [tries(tmp_path / "changed", config, each, wrapped) for each in changed_tensors(tensors)]
    assert not all(taken)


@pytest.mark.slow
@pytest.mark.parametrize("made", ONE_OF_EACH_METHOD, indirect=True)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numbers that overflow, as they were told to
def test_a_changed_setting_is_a_problem_and_no_fault(made: Path, wrapped: WrappedModel, tmp_path: Path) -> None:
    config, tensors = json.loads((made / CONFIG_FILE).read_text()), load_file(made / TENSOR_FILE)
    for key in sorted(config.keys() - LEFT_ALONE):
        for value in VALUES:
            tries(tmp_path / "changed", {**config, key: value}, tensors, wrapped)
