import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM

from manylora.errors import InvalidRequest
from manylora.identity import CONFIG_FILE
from manylora.lifecycle.adapter_files import write_adapter
from manylora.lifecycle.base import load_base
from manylora.lifecycle.weights.low_rank import (
    Pair,
    applied,
    distance,
    lora_files,
    rank_for_energy,
    read_lora,
    short_targets,
    thin_svd,
    truncate,
)
from manylora.models.wrapping import adaptable_modules
from tests.conftest import ModelMaker
from tests.resized import make_resized
from tests.tiny_adapters import make_adapter


def _pair(rank: int = 4, out: int = 12, width: int = 9, seed: int = 0) -> Pair:
    random = torch.Generator().manual_seed(seed)
    return Pair("linear", torch.randn(rank, width, generator=random), torch.randn(out, rank, generator=random))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_applied_adapter_computes_what_peft_computes(
    tiny_model_dir: ModelMaker, tmp_path: Path, architecture: str
) -> None:
    folder = make_adapter(
        tiny_model_dir(architecture), tmp_path / "a", rank=4, alpha=12, rank_pattern={r".*\.1\..*": 2}
    )
    base = load_base(str(tiny_model_dir(architecture)), device="cpu", dtype="float32")
    ids = torch.tensor([[5, 17, 30, 4]])
    oracle = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir(architecture), dtype=torch.float32), folder
    )

    with torch.inference_mode(), applied(base.model, read_lora(folder, adaptable_modules(base.model)).pairs):
        found = base.model(ids).logits
    with torch.inference_mode():
        torch.testing.assert_close(found, oracle(ids).logits, rtol=1e-4, atol=1e-4)


def test_base_is_itself_again_after_applying(tiny_llama_dir: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_llama_dir), device="cpu", dtype="float32")
    ids = torch.tensor([[5, 17, 30, 4]])
    pairs = read_lora(make_adapter(tiny_llama_dir, tmp_path / "a")).pairs
    with torch.inference_mode():
        before = base.model(ids).logits
        with applied(base.model, pairs):
            assert not torch.equal(base.model(ids).logits, before)
        assert torch.equal(base.model(ids).logits, before)


@settings(deadline=None)
@given(rank=st.integers(1, 20), out=st.integers(1, 16), width=st.integers(1, 16), seed=st.integers(0, 50))
def test_svd_without_the_full_matrix_is_numpys_svd_of_it(rank: int, out: int, width: int, seed: int) -> None:
    pair = _pair(rank, out, width, seed)
    left, values, right = thin_svd(pair)
    wanted = np.linalg.svd(pair.dense().double().numpy(), compute_uv=False)

    np.testing.assert_allclose(values.numpy(), wanted[: len(values)], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close((left * values) @ right, pair.dense(), rtol=1e-3, atol=1e-3)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(0, 50))
def test_truncation_error_is_the_discarded_singular_values(rank: int, seed: int) -> None:
    pair = _pair(seed=seed)
    values = np.linalg.svd(pair.dense().double().numpy(), compute_uv=False)

    best, kept, error = truncate(*thin_svd(pair), "linear", rank)

    assert error == pytest.approx(np.sqrt((values[rank:] ** 2).sum()), rel=1e-3, abs=1e-3)
    assert float((best.dense() - pair.dense()).norm()) == pytest.approx(error, rel=1e-3, abs=1e-3)
    assert kept == pytest.approx((values[:rank] ** 2).sum() / (values**2).sum(), rel=1e-4)


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(1, 6), st.integers(1, 6))
def test_distance_without_the_full_matrices_is_numpys(seed: int, rank: int, other_rank: int) -> None:
    one, other = _pair(rank, seed=seed), _pair(other_rank, seed=seed + 1)
    wanted = np.linalg.norm(one.dense().double().numpy() - other.dense().double().numpy())

    assert distance(one, other) == pytest.approx(wanted, rel=1e-5)
    assert distance(one, one) == pytest.approx(0.0, abs=1e-10)


def test_factors_are_balanced() -> None:
    pair, _, _ = truncate(*thin_svd(_pair()), "linear", 3)

    torch.testing.assert_close(pair.a @ pair.a.T, pair.b.T @ pair.b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.83, 1), (0.84, 2), (0.96, 3), (1.0, 3)])
def test_rank_for_energy_is_the_fewest_that_hold_it(energy: float, rank: int) -> None:
    values = torch.tensor([8.0, 3.0, 2.0]) / 77**0.5  # shares 64/77, 9/77, 4/77

    assert rank_for_energy(values, energy) == rank


def test_mixed_ranks_survive_writing_and_reading(tiny_llama_dir: Path, tmp_path: Path) -> None:
    source = read_lora(make_adapter(tiny_llama_dir, tmp_path / "a", rank=6, alpha=3))
    pairs = {
        path: truncate(*thin_svd(pair), pair.kind, 1 + index % 3)[0]
        for index, (path, pair) in enumerate(source.pairs.items())
    }
    (tmp_path / "b").mkdir()

    files = lora_files(pairs, targets=source.config["target_modules"], base_name="x", dtype=torch.float32)
    write_adapter(tmp_path / "b", *files)

    found = read_lora(tmp_path / "b")
    assert {path: p.rank for path, p in found.pairs.items()} == {path: p.rank for path, p in pairs.items()}
    for path, pair in pairs.items():
        torch.testing.assert_close(found.pairs[path].dense(), pair.dense())


def test_targets_are_leaf_names_only_where_all_of_them_are_meant() -> None:
    modules = ["l.0.q", "l.0.v", "l.1.q", "l.1.v"]

    assert short_targets(["l.0.q", "l.1.q", "l.1.v"], modules) == ["q", "l.1.v"]


def test_half_precision_overflow_is_refused() -> None:
    pairs = {"m": Pair("linear", torch.ones(1, 4), torch.full((4, 1), 1e30))}

    with pytest.raises(InvalidRequest, match="does not fit"):
        lora_files(pairs, targets=["m"], base_name=None, dtype=torch.float16)


def test_folder_that_is_no_adapter_is_refused(tmp_path: Path, tiny_llama_dir: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"adapter_config.json is missing"):
        read_lora(tmp_path)
    folder = make_adapter(tiny_llama_dir, tmp_path / "a")
    (folder / "adapter_model.safetensors").write_bytes(b"garbage")
    with pytest.raises(InvalidRequest, match="not a safetensors file"):
        read_lora(folder)


def test_adapter_with_features_that_are_not_low_rank_is_refused(tmp_path: Path, tiny_llama_dir: Path) -> None:
    with pytest.raises(InvalidRequest, match="has use_dora"):
        read_lora(make_adapter(tiny_llama_dir, tmp_path / "a", use_dora=True))


@pytest.mark.parametrize("config", [{"peft_type": "PREFIX_TUNING"}, {"alora_invocation_tokens": [5]}])
def test_what_acts_on_prompts_is_refused_without_a_way_that_there_is_not(
    config: dict[str, object], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    folder = make_adapter(tiny_llama_dir, tmp_path / "a")
    known = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**known, **config}))
    with pytest.raises(InvalidRequest, match="serve it as it is"):
        read_lora(folder)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"peft_type": "IA3"}, "is of the type IA3"),
        ({"peft_type": "LORA", "use_dora": True, "modules_to_save": ["lm_head"]}, "has use_dora, modules_to_save"),
        ({"peft_type": "LORA", "trainable_token_indices": [3]}, "has trainable_token_indices"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa"}, "has init_lora_weights"),
        ({"peft_type": "LORA", "target_parameters": ["experts.down_proj"]}, "has target_parameters"),
    ],
)
def test_another_kind_is_refused_by_its_name_and_with_the_way_out(
    config: dict[str, object], named: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    folder = make_adapter(tiny_llama_dir, tmp_path / "a")
    known = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**known, **config}))
    with pytest.raises(InvalidRequest, match=f"plain low-rank adapters, and this one {named}.*manylora extract"):
        read_lora(folder)


def test_a_kind_that_is_served_nowhere_is_refused_with_what_can_be_done(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folder = make_adapter(tiny_llama_dir, tmp_path / "a")
    known = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**known, "peft_type": "XLORA"}))
    with pytest.raises(InvalidRequest, match=r"is of the type XLORA\. It is not served either: .* one by one\.$"):
        read_lora(folder)


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_biases_are_refused_by_name(tiny_model_dir: ModelMaker, tmp_path: Path) -> None:
    folder = make_adapter(tiny_model_dir("gpt2"), tmp_path / "a", targets=["c_attn"], fan_in_fan_out=True, bias="all")
    with pytest.raises(InvalidRequest, match="and this one has bias"):
        read_lora(folder)


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_tokens_of_its_own_are_refused_by_name(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folder = make_resized(tiny_llama_dir, tmp_path / "a", 325)
    with pytest.raises(InvalidRequest, match=r"the whole weight (lm_head|model\.embed_tokens)\.weight\. .*extract"):
        read_lora(folder)
