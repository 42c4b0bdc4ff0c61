"""Packed weights, read back through the reference kernel, are PEFT's own delta weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from manylora.kernels.reference import LowRank, add_lora
from manylora.lora.format import reader as adapter_format
from manylora.lora.memory.packing import PackedAdapter, pack
from manylora.lora.memory.terms import padded_rank
from manylora.models.wrapping import adaptable_modules
from tests.conftest import ModelMaker
from tests.engine.harness import load
from tests.engine.oracle import with_adapter
from tests.tiny_adapters import make_adapter

CASES: dict[str, dict[str, Any]] = {
    "plain": {"rank": 8},
    "alpha": {"rank": 6, "alpha": 24},
    "rslora": {"rank": 16, "alpha": 4, "use_rslora": True},
    "patterns": {"rank": 4, "alpha": 8, "rank_pattern": {"q_proj": 12, "attn": 12}, "alpha_pattern": {"proj": 3}},
}
EVERYTHING = {
    "llama": ["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"],
    "gpt2": ["c_attn", "c_proj", "c_fc", "wte", "lm_head"],
}


def packed(
    base: Path, adapter: Path, dtype: torch.dtype = torch.float32, *, has_scales: bool = False
) -> tuple[PackedAdapter, dict[str, int]]:
    modules = adaptable_modules(load(base))
    sites = {path: 3 * i + 1 for i, path in enumerate(modules)}
    return pack(adapter_format.read_trusted(adapter, modules), sites, dtype, has_scales=has_scales), sites


def low_rank(found: PackedAdapter, site: int, *, is_embedding: bool) -> LowRank:
    extent, rank = found.layout.low_rank[site], found.ranks[site]
    a = found.data[extent.a : extent.a + extent.padded * extent.in_features]
    b = found.data[extent.b : extent.b + extent.padded * extent.out_features].view(extent.padded, -1)
    wide = a.view(-1, extent.padded).T if is_embedding else a.view(extent.padded, -1)
    assert not wide[rank:].any(), "padding is zero"
    assert not b[rank:].any(), "padding is zero"
    return LowRank(wide[:rank], b[:rank])


def scales_of(found: PackedAdapter, site: int) -> torch.Tensor:
    count = found.ranks[site] * found.layout.float_elements
    return found.data[found.layout.low_rank[site].scales :][:count].view(torch.float32)


@pytest.mark.parametrize("architecture", EVERYTHING)
@pytest.mark.parametrize("case", CASES)
def test_deltas_are_those_of_peft(architecture: str, case: str, tiny_model_dir: ModelMaker, tmp_path: Path) -> None:
    base = tiny_model_dir(architecture)
    adapter = make_adapter(base, tmp_path / "adapter", targets=EVERYTHING[architecture], **CASES[case])
    found, sites = packed(base, adapter)
    tuned = with_adapter(base, adapter)
    layers = {n.removeprefix("base_model.model."): m for n, m in tuned.named_modules() if isinstance(m, LoraLayer)}
    assert {sites[path] for path in layers} == set(found.ranks)
    for path, layer in layers.items():
        expected = layer.get_delta_weight("default").detach()
        is_embedding = path.endswith(("embed_tokens", "wte"))
        pair = low_rank(found, sites[path], is_embedding=is_embedding)
        assert len(pair.a) == layer.r["default"]
        identity = torch.eye(pair.a.shape[1])
        delta = add_lora(torch.zeros(len(identity), pair.b.shape[1]), identity, [pair], [0] * len(identity))
        # PEFT gives a linear's as [out, in]; an embedding's and a Conv1D's as [in, out].
        is_turned = is_embedding or getattr(layer, "fan_in_fan_out", False)
        torch.testing.assert_close(delta.float(), expected if is_turned else expected.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaling_is_folded_in_before_the_rounding(
    dtype: torch.dtype, tiny_model_dir: ModelMaker, tmp_path: Path
) -> None:
    base = tiny_model_dir("llama")
    adapter = make_adapter(base, tmp_path / "adapter", rank=8, alpha=3, targets=["q_proj"])
    exact, _ = packed(base, adapter)
    found, _ = packed(base, adapter, dtype)
    assert found.data.dtype is dtype
    assert torch.equal(found.data, exact.data.to(dtype))
    assert found.size_bytes == found.layout.numel * 2


@pytest.mark.parametrize("architecture", EVERYTHING)
def test_int8_rounds_each_rank_of_each_matrix_to_steps_of_its_own(
    architecture: str, tiny_model_dir: ModelMaker, tmp_path: Path
) -> None:
    base = tiny_model_dir(architecture)
    adapter = make_adapter(base, tmp_path / "adapter", alpha=3, targets=EVERYTHING[architecture], rank=5)
    exact, sites = packed(base, adapter)
    found, _ = packed(base, adapter, torch.int8)
    assert found.size_bytes < 0.5 * exact.size_bytes
    for path, site in sites.items():
        if site not in found.ranks:
            continue
        is_embedding = path.endswith(("embed_tokens", "wte"))
        rounded, pair = (low_rank(each, site, is_embedding=is_embedding) for each in (found, exact))
        for whole, matrix in ((rounded.a, pair.a), (rounded.b, pair.b)):
            assert whole.abs().amax(dim=1).tolist() == [127] * len(pair.a)
            steps = matrix.abs().amax(dim=1, keepdim=True) / 127
            assert ((whole * steps - matrix).abs() <= 0.5001 * steps).all()
        worth = (pair.a.abs().amax(dim=1) / 127) * (pair.b.abs().amax(dim=1) / 127)
        torch.testing.assert_close(scales_of(found, site), worth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_with_scales_the_matrices_are_those_of_the_files(
    dtype: torch.dtype, tiny_model_dir: ModelMaker, tmp_path: Path
) -> None:
    base = tiny_model_dir("llama")
    adapter = make_adapter(base, tmp_path / "adapter", rank=8, alpha=3, targets=["q_proj"])
    file = adapter / "adapter_model.safetensors"
    save_file({name: matrix.to(dtype) for name, matrix in load_file(file).items()}, file)
    found, sites = packed(base, adapter, dtype, has_scales=True)
    site = sites["model.layers.1.self_attn.q_proj"]
    pair = low_rank(found, site, is_embedding=False)
    names = {name.split(".lora_")[1][0]: matrix for name, matrix in load_file(file).items() if ".1.self_attn.q" in name}
    assert torch.equal(pair.a, names["A"])
    assert torch.equal(pair.b, names["B"].T)
    assert scales_of(found, site).tolist() == [3 / 8] * 8


def test_int8_keeps_a_rank_of_zeros(tiny_model_dir: ModelMaker, tmp_path: Path) -> None:
    base = tiny_model_dir("llama")
    adapter = make_adapter(base, tmp_path / "adapter", rank=4, targets=["q_proj"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for matrix in tensors.values():
        (matrix if len(matrix) == 4 else matrix.T)[1] = 0
    save_file(tensors, file)
    found, sites = packed(base, adapter, torch.int8)
    pair = low_rank(found, sites["model.layers.0.self_attn.q_proj"], is_embedding=False)
    assert not pair.a[1].any()
    assert not pair.b[1].any()
    assert pair.a[0].any()


def test_an_adapter_takes_the_room_of_what_it_touches(tiny_model_dir: ModelMaker, tmp_path: Path) -> None:
    base = tiny_model_dir("llama")
    adapter = make_adapter(base, tmp_path / "adapter", rank=5, targets=["q_proj"], layers_to_transform=[1])
    found, sites = packed(base, adapter)
    assert found.ranks == {sites["model.layers.1.self_attn.q_proj"]: 5}
    assert found.layout.numel == padded_rank(5) * (64 + 64)


def test_packing_twice_gives_the_same_bits(tiny_model_dir: ModelMaker, tmp_path: Path) -> None:
    base = tiny_model_dir("llama")
    adapter = make_adapter(base, tmp_path / "adapter", alpha=3)
    assert torch.equal(packed(base, adapter)[0].data, packed(base, adapter)[0].data)
