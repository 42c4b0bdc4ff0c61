import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from manylora.errors import InvalidRequest, ManyloraError
from manylora.lifecycle.progress import Progress
from manylora.lifecycle.weights.config import MergeConfig, parse_adapter
from manylora.lifecycle.weights.deltas import combined, delta_of
from manylora.lifecycle.weights.low_rank import read_lora
from manylora.lifecycle.weights.merge import merge
from tests.conftest import ModelMaker
from tests.tiny_adapters import make_adapter
from tests.tiny_models import make_tiny_model

IDS = torch.tensor([[5, 17, 30, 4, 99]])


def _peft(base: Path, folder: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)


def _greedy(model: Any) -> list[int]:
    out = model.generate(input_ids=IDS, max_new_tokens=20, do_sample=False)
    return [int(token) for token in out[0]]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "qwen2"])
def test_merged_checkpoint_answers_as_base_and_adapter(
    tiny_model_dir: ModelMaker, tmp_path: Path, architecture: str
) -> None:
    base = tiny_model_dir(architecture)
    folder = make_adapter(base, tmp_path / "a", rank=4, alpha=6)

    report = merge(MergeConfig(((folder, 1.0),), tmp_path / "merged", base=str(base)))

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    oracle = _peft(base, folder)
    with torch.inference_mode():
        torch.testing.assert_close(merged(IDS).logits, oracle(IDS).logits, rtol=1e-3, atol=1e-3)
    assert _greedy(merged) == _greedy(oracle)
    assert report["difference"]["max_abs_logit"] < 1e-3 < report["effect"]["max_abs_logit"]


def test_weighted_adapters_add_up_in_the_base(tiny_llama_dir: Path, tmp_path: Path) -> None:
    a = make_adapter(tiny_llama_dir, tmp_path / "a", rank=4, seed=1)
    b = make_adapter(tiny_llama_dir, tmp_path / "b", rank=2, seed=2, targets=["v_proj"])

    merge(MergeConfig(((a, 0.5), (b, -2.0)), tmp_path / "m", base=str(tiny_llama_dir)))

    before = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).state_dict()
    path = "model.layers.1.self_attn.v_proj"
    wanted = 0.5 * read_lora(a).pairs[path].dense() - 2.0 * read_lora(b).pairs[path].dense()
    torch.testing.assert_close(after[f"{path}.weight"] - before[f"{path}.weight"], wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("method", "peft_type"), [("svd", "svd"), ("ties", "ties_svd")])
def test_merged_adapter_is_pefts(tiny_llama_dir: Path, tmp_path: Path, method: Any, peft_type: str) -> None:
    a = make_adapter(tiny_llama_dir, tmp_path / "a", rank=4, seed=1, targets=["q_proj", "up_proj"])
    b = make_adapter(tiny_llama_dir, tmp_path / "b", rank=4, seed=2, targets=["q_proj", "up_proj"])
    oracle = _peft(tiny_llama_dir, a)
    oracle.load_adapter(str(b), "second")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle.add_weighted_adapter(["default", "second"], [0.7, 0.3], "m", peft_type, svd_rank=3, density=0.4)

    config = MergeConfig(
        ((a, 0.7), (b, 0.3)), tmp_path / "m", into_base=False, method=method, rank=3, density=0.4, dtype="float32"
    )
    merge(config)

    for path, pair in read_lora(tmp_path / "m").pairs.items():
        layer = oracle.base_model.model.get_submodule(path)
        torch.testing.assert_close(pair.dense(), layer.get_delta_weight("m"), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_exact_methods_keep_the_weighted_sum(tiny_llama_dir: Path, tmp_path: Path, method: Any) -> None:
    a = make_adapter(tiny_llama_dir, tmp_path / "a", rank=4, seed=1)
    b = make_adapter(tiny_llama_dir, tmp_path / "b", rank=2, seed=2, targets=["v_proj"])

    report = merge(MergeConfig(((a, 1.0), (b, 0.25)), tmp_path / "m", into_base=False, method=method))

    merged, one, two = read_lora(tmp_path / "m"), read_lora(a), read_lora(b)
    assert merged.pairs.keys() == one.pairs.keys()
    for path, pair in merged.pairs.items():
        wanted = one.pairs[path].dense()
        if path in two.pairs:
            wanted = wanted + 0.25 * two.pairs[path].dense()
            assert pair.rank == 6
        torch.testing.assert_close(pair.dense(), wanted, rtol=1e-3, atol=1e-5)
    assert report["method"] == method


def test_dare_at_full_density_is_ties_and_keeps_the_mean_below_it() -> None:
    random = torch.Generator().manual_seed(0)
    deltas = [torch.randn(60, 50, generator=random) for _ in range(2)]

    full = combined(deltas, [1.0, 0.5], "dare_ties", density=1.0, seed=0)
    one = torch.stack([combined(deltas[:1], [1.0], "dare_ties", density=0.5, seed=s) for s in range(300)])

    torch.testing.assert_close(full, combined(deltas, [1.0, 0.5], "ties", density=1.0, seed=0))
    assert float((one.mean(0) - deltas[0]).abs().mean()) < 0.06
    assert float((one[0] == 0).float().mean()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("method", ["linear", "cat", "svd", "ties", "dare_ties"])
def test_merged_adapter_is_verified_on_the_base_that_its_parts_name(
    tiny_llama_dir: Path, tmp_path: Path, method: Any
) -> None:
    a = make_adapter(tiny_llama_dir, tmp_path / "a", rank=4, seed=1)
    b = make_adapter(tiny_llama_dir, tmp_path / "b", rank=4, seed=2)

    report = merge(MergeConfig(((a, 0.5), (b, 0.5)), tmp_path / "m", into_base=False, method=method, rank=64))

    assert report["difference"]["max_abs_logit"] < 1e-3 < report["effect"]["max_abs_logit"]
    assert json.loads((tmp_path / "m.report" / "merge.json").read_text()) == report


def test_merged_adapter_of_too_small_a_rank_is_warned_of(tiny_llama_dir: Path, tmp_path: Path) -> None:
    a = make_adapter(tiny_llama_dir, tmp_path / "a", rank=8, seed=1)
    b = make_adapter(tiny_llama_dir, tmp_path / "b", rank=8, seed=2)
    events: list[Progress] = []

    config = MergeConfig(((a, 1.0), (b, 1.0)), tmp_path / "m", into_base=False, method="svd", rank=1)
    report = merge(config, listen=events.append)

    assert "much of their effect is lost. Choose a larger `rank`" in report["warnings"][0]
    assert report["warnings"][0] in [e.message for e in events if e.stage == "warning"]


def test_base_that_is_not_here_is_said_and_another_can_be_named(tiny_llama_dir: Path, tmp_path: Path) -> None:
    parts = []
    for seed, name in enumerate("ab"):
        folder = make_adapter(tiny_llama_dir, tmp_path / name, seed=seed)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "far/away"}))
        parts.append((folder, 1.0))
    events: list[Progress] = []

    report = merge(MergeConfig(tuple(parts), tmp_path / "m", into_base=False), listen=events.append)
    named = merge(MergeConfig(tuple(parts), tmp_path / "n", into_base=False, verify_on=str(tiny_llama_dir)))

    assert "difference" not in report
    assert "base (far/away) is not here. Give `verify_on`" in next(e.message for e in events if e.stage == "warning")
    assert named["difference"]["max_abs_logit"] < 1e-3


def test_checkpoint_that_answers_with_nan_is_not_written(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folder = make_adapter(tiny_llama_dir, tmp_path / "a")
    config = MergeConfig(((folder, 1e7),), tmp_path / "m", base=str(tiny_llama_dir), dtype="float16")

    with pytest.raises(ManyloraError, match="float16 cannot hold it"):
        merge(config)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_effect_that_rounding_swallows_is_warned_of(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folder = make_adapter(tiny_llama_dir, tmp_path / "a", strength=1e-5)

    report = merge(MergeConfig(((folder, 1.0),), tmp_path / "m", base=str(tiny_llama_dir), dtype="bfloat16"))

    assert "much of their effect is lost. Choose `dtype` float32" in report["warnings"][0]


def test_dare_drops_other_entries_in_each_module_and_the_same_for_a_seed(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folders = [make_adapter(tiny_llama_dir, tmp_path / name, seed=i) for i, name in enumerate("ab")]
    loras = [read_lora(folder) for folder in folders]
    config = MergeConfig(tuple((f, 1.0) for f in folders), tmp_path / "m", method="dare_ties", density=0.3)
    paths = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")

    kept = [delta_of(config, loras, path) != 0 for path in paths]

    assert not torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], delta_of(config, loras, paths[0]) != 0)
    assert not torch.equal(kept[0], delta_of(replace(config, seed=1), loras, paths[0]) != 0)


def test_adapter_of_another_base_is_warned_of(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folder = make_adapter(make_tiny_model("llama", tmp_path / "other"), tmp_path / "a")
    events: list[Progress] = []

    merge(MergeConfig(((folder, 1.0),), tmp_path / "m", base=str(tiny_llama_dir)), listen=events.append)

    assert any("other as its base, and it is merged into tiny-llama" in e.message for e in events)


def test_dtype_of_the_checkpoint_is_chosen(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folder = make_adapter(tiny_llama_dir, tmp_path / "a")

    report = merge(MergeConfig(((folder, 1.0),), tmp_path / "m", base=str(tiny_llama_dir), dtype="bfloat16"))

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto").dtype == torch.bfloat16
    assert 0 < report["difference"]["max_abs_logit"] < report["effect"]["max_abs_logit"]


def test_head_tied_to_the_embedding_is_not_merged(tmp_path: Path) -> None:
    base = make_tiny_model("llama", tmp_path / "tied", tie_word_embeddings=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = make_adapter(base, tmp_path / "a", targets=["lm_head", "q_proj"])

    with pytest.raises(InvalidRequest, match="ties its head to its embedding"):
        merge(MergeConfig(((folder, 1.0),), tmp_path / "m", base=str(base)))
    assert not (tmp_path / "m").exists()


def test_adapters_of_different_bases_are_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    other = make_tiny_model("llama", tmp_path / "other", intermediate_size=128)
    a = make_adapter(tiny_llama_dir, tmp_path / "a")
    b = make_adapter(other, tmp_path / "b")

    with pytest.raises(InvalidRequest, match="made for another base"):
        merge(MergeConfig(((a, 1.0), (b, 1.0)), tmp_path / "m", into_base=False))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "average"}, "`method` must be one of"),
        ({"adapters": ()}, "give `adapters`"),
        ({"into_base": False}, "at least two `adapters`"),
        ({"rank": 4}, "not together with `base`"),
        ({"density": 0.0}, "`density`"),
    ],
)
def test_bad_arguments_are_refused(tiny_llama_dir: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    folder = make_adapter(tiny_llama_dir, tmp_path / "a")
    values: dict[str, Any] = {"adapters": ((folder, 1.0),), "out": tmp_path / "m", "base": "/no/such/model"}
    values |= change

    with pytest.raises(InvalidRequest, match=words):
        merge(MergeConfig(**values))


def test_weights_are_read_off_the_adapter_argument(tmp_path: Path) -> None:
    odd = tmp_path / "name:3"
    odd.mkdir()

    assert parse_adapter("some/folder:0.5") == (Path("some/folder"), 0.5)
    assert parse_adapter("some/folder") == (Path("some/folder"), 1.0)
    assert parse_adapter(str(odd)) == (odd, 1.0)
    with pytest.raises(InvalidRequest, match="is not a weight"):
        parse_adapter("folder:much")
