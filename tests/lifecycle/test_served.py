"""What a running server says of the insides of its adapters."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from manylora.lifecycle.weights.config import InspectConfig
from manylora.lifecycle.weights.inspection import inspect_adapter
from manylora.lifecycle.weights.served import Inspector, stored_norms
from manylora.models.wrapping import adaptable_modules
from tests.conftest import ModelMaker
from tests.engine.harness import load
from tests.tiny_adapters import make_adapter


@pytest.fixture
def adapter(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return make_adapter(tiny_llama_dir, tmp_path / "adapter", rank=4, seed=3)


def inspector_of(folder: Path) -> Inspector:
    return Inspector(folder, adaptable_modules(load(folder)))


def test_the_server_says_what_the_command_says(tiny_llama_dir: Path, adapter: Path) -> None:
    served = inspector_of(tiny_llama_dir)(adapter)
    told = inspect_adapter(InspectConfig(adapter, base=str(tiny_llama_dir)))

    assert served.keys() == told.keys()
    assert served["modules"].keys() == told["modules"].keys()
    for path, module in told["modules"].items():
        mine = served["modules"][path]
        assert mine["relative_norm"] == pytest.approx(module["relative_norm"], rel=1e-4)
        assert mine["effective_rank"] == pytest.approx(module["effective_rank"], rel=1e-4)
        assert mine["singular_values"] == pytest.approx(module["singular_values"], rel=1e-4)


def test_an_adapter_of_another_base_is_described_without_it(tiny_model_dir: ModelMaker, adapter: Path) -> None:
    report = inspector_of(tiny_model_dir("gpt2"))(adapter)

    assert report["modules"]
    assert {module["relative_norm"] for module in report["modules"].values()} == {None}


def test_norms_are_found_under_names_without_the_models_prefix(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    save_file({"h.0.attn.c_attn.weight": weight, "wte.weight": weight + 1}, tmp_path / "model.safetensors")

    norms = stored_norms(tmp_path, ["transformer.h.0.attn.c_attn", "lm_head"])

    assert norms == {"transformer.h.0.attn.c_attn": pytest.approx(float(weight.norm()))}


def test_norms_of_half_precision_weights_do_not_overflow(tmp_path: Path) -> None:
    weight = torch.full((64, 64), 60_000.0, dtype=torch.float16)
    save_file({"a.weight": weight}, tmp_path / "model.safetensors")

    assert stored_norms(tmp_path, ["a"])["a"] == pytest.approx(60_000.0 * 64, rel=1e-3)


def test_the_base_is_read_once_for_each_module(tiny_llama_dir: Path, adapter: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_llama_dir.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    inspector = inspector_of(base)
    first = inspector(adapter)
    save_file({k: v * 2 for k, v in load_file(base / "model.safetensors").items()}, base / "model.safetensors")

    assert inspector(adapter) == first
