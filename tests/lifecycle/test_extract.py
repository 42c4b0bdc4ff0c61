from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from manylora.errors import InvalidRequest
from manylora.lifecycle.weights.config import ExtractConfig, MergeConfig
from manylora.lifecycle.weights.extract import extract
from manylora.lifecycle.weights.low_rank import read_lora
from manylora.lifecycle.weights.merge import merge
from tests.conftest import ModelMaker
from tests.tiny_adapters import make_adapter
from tests.tiny_models import make_tiny_model, make_tokenizer


def _tuned(base: Path, folder: Path, *, only: str = "", seed: int = 1) -> Path:
    """A full fine-tune: every parameter (whose name contains `only`) moved a little."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if only in name:
                weight.add_(torch.randn_like(weight) * 0.02)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_full_rank_gives_back_the_fine_tunes_logits(
    tiny_model_dir: ModelMaker, tmp_path: Path, architecture: str
) -> None:
    base = tiny_model_dir(architecture)
    tuned = _tuned(base, tmp_path / "tuned", only="mlp")
    if architecture == "gpt2":  # GPT-2's linears have biases, which a low-rank delta cannot hold
        tuned = _tuned(base, tmp_path / "tuned-weights", only="mlp.c_fc.weight")

    report = extract(ExtractConfig(str(tuned), tmp_path / "a", str(base), rank=1000))

    assert report["difference"]["adapter"]["max_abs_logit"] < 1e-4 < report["difference"]["base"]["max_abs_logit"]
    assert report["not_expressed"] == []
    assert all(m["energy"] == pytest.approx(1.0) for m in report["modules"].values())


def test_error_at_a_rank_is_numpys_discarded_singular_values(tiny_llama_dir: Path, tmp_path: Path) -> None:
    tuned = _tuned(tiny_llama_dir, tmp_path / "tuned")

    report = extract(ExtractConfig(str(tuned), tmp_path / "a", str(tiny_llama_dir), rank=4))

    before, after = load_file(tiny_llama_dir / "model.safetensors"), load_file(tuned / "model.safetensors")
    for path, pair in read_lora(tmp_path / "a").pairs.items():
        delta = (after[f"{path}.weight"] - before[f"{path}.weight"]).double().numpy()
        values = np.linalg.svd(delta, compute_uv=False)
        wanted = np.sqrt((values[4:] ** 2).sum())
        assert report["modules"][path]["error"] == pytest.approx(wanted, rel=1e-3)
        assert np.linalg.norm(delta - pair.dense().numpy()) == pytest.approx(wanted, rel=1e-3)


def test_what_cannot_be_expressed_is_listed(tiny_llama_dir: Path, tmp_path: Path) -> None:
    tuned = _tuned(tiny_llama_dir, tmp_path / "tuned")

    report = extract(ExtractConfig(str(tuned), tmp_path / "a", str(tiny_llama_dir), rank=4))

    listed = {entry["parameter"] for entry in report["not_expressed"]}
    names = load_file(tiny_llama_dir / "model.safetensors")
    assert listed == {name for name in names if "norm" in name or "embed" in name}
    assert all(entry["largest"] > 0 for entry in report["not_expressed"])


def test_energy_decides_the_rank_of_each_module(tiny_llama_dir: Path, tmp_path: Path) -> None:
    tuned = _tuned(tiny_llama_dir, tmp_path / "tuned")

    report = extract(ExtractConfig(str(tuned), tmp_path / "a", str(tiny_llama_dir), energy=0.9))

    assert all(m["energy"] >= 0.9 for m in report["modules"].values())
    assert {m["rank"] for m in report["modules"].values()} == {p.rank for p in read_lora(tmp_path / "a").pairs.values()}


def test_merge_then_extract_returns_the_adapter(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Up to rotation: the products are the same, the factors need not be."""
    folder = make_adapter(tiny_llama_dir, tmp_path / "a", rank=3, targets=["q_proj", "down_proj"])
    merge(MergeConfig(((folder, 1.0),), tmp_path / "merged", base=str(tiny_llama_dir)))

    extract(ExtractConfig(str(tmp_path / "merged"), tmp_path / "b", str(tiny_llama_dir), rank=3))

    before, after = read_lora(folder), read_lora(tmp_path / "b")
    assert before.pairs.keys() == after.pairs.keys()
    assert after.config["target_modules"] == ["down_proj", "q_proj"]
    for path, pair in before.pairs.items():
        torch.testing.assert_close(after.pairs[path].dense(), pair.dense(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [({"hidden_size": 32}, r"is \[.*\] in the base"), ({"num_hidden_layers": 1}, "different parameters")],
)
def test_models_of_different_shape_are_refused(
    tiny_llama_dir: Path, tmp_path: Path, overrides: dict[str, Any], words: str
) -> None:
    other = make_tiny_model("llama", tmp_path / "other", **overrides)

    with pytest.raises(InvalidRequest, match=words):
        extract(ExtractConfig(str(other), tmp_path / "a", str(tiny_llama_dir), rank=4))
    assert not (tmp_path / "a").exists()


def test_equal_models_have_nothing_to_extract(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="nothing to extract"):
        extract(ExtractConfig(str(tiny_llama_dir), tmp_path / "a", str(tiny_llama_dir), rank=4))
