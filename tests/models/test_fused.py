"""Layers of the usual shape run fused, and only where they compute the same."""

from pathlib import Path

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM, PreTrainedModel

from manylora.errors import ModelUnusable
from manylora.models import fused, native, selfcheck
from manylora.models.attention import AttentionOptions
from manylora.models.kv_cache import KVCache, KVShape
from manylora.models.matmul import factory
from manylora.models.operators import LayerOperators, NativeOperators, TorchOperators
from manylora.models.selfcheck import single_sequence
from manylora.models.wrapping import WrappedModel, wrap
from tests.engine.harness import load
from tests.tiny_models import make_tiny_model

CPU = torch.device("cpu")

ALL_OPERATORS: dict[str, type[NativeOperators] | type[TorchOperators]] = {
    "native": NativeOperators,
    "torch": TorchOperators,
}


@pytest.fixture(params=ALL_OPERATORS)
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and not native.is_available():
        pytest.skip("the C++ kernels are not installed")
    return str(request.param)


def wrapped(model: PreTrainedModel, kind: str) -> tuple[WrappedModel, KVCache, LayerOperators]:
    ours = wrap(model, factory(use_native=kind == "native"))
    cache = KVCache(ours.survey.kv_shapes, 8, 4, model.dtype, torch.device("cpu"))
    ours.attach_cache(cache, use_native=kind == "native")
    return ours, cache, ALL_OPERATORS[kind]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2"])
def test_usual_layers_are_fused_and_compute_the_same(
    architecture: str, dtype: torch.dtype, kind: str, tmp_path: Path
) -> None:
    ours, cache, operators = wrapped(load(make_tiny_model(architecture, tmp_path)).to(dtype), kind)
    assert len(fused.fuse(ours, cache, operators)) == len(cache.keys)
    selfcheck.check(ours, cache)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "qwen3", "phi3", "gpt2", "gpt_neox"])
def test_other_layers_are_left_alone(architecture: str, kind: str, tmp_path: Path) -> None:
    ours, cache, operators = wrapped(load(make_tiny_model(architecture, tmp_path)), kind)
    assert fused.fuse(ours, cache, operators) == {}
    selfcheck.check(ours, cache)


@pytest.mark.parametrize("start", [0, 6])
@pytest.mark.parametrize("rotary_dim", [4, 8])
def test_both_kinds_of_operators_agree(rotary_dim: int, start: int) -> None:
    if not native.is_available():
        pytest.skip("the C++ kernels are not installed")
    random = torch.Generator().manual_seed(rotary_dim)
    rows, heads, num_kv, dim, block = 5, 4, 2, 8, 4
    batch = single_sequence(torch.arange(rows), start, KVCache([KVShape(num_kv, dim)], 8, block, torch.float32, CPU))
    qkv = torch.randn(rows, heads + 2 * num_kv, dim, generator=random)
    cos, sin = (torch.randn(rows, rotary_dim, generator=random) for _ in "cs")
    weight, gate_up = torch.randn(24, generator=random), torch.randn(rows, 48, generator=random)
    results = []
    for operators in (NativeOperators(), TorchOperators()):
        keys, values = (torch.zeros(8, num_kv, block, dim) for _ in "kv")
        options = AttentionOptions(0.3, 0, 0.0)
        attended = operators.attend(qkv.clone(), operators.rotary(cos, sin), keys, values, batch, options)
        residual = gate_up[:, :24].clone()
        results.append([
            attended, keys, values,
            operators.rms_norm(residual, weight, 1e-5), operators.silu_and_mul(gate_up),
            operators.add_rms_norm_(residual, gate_up[:, 24:], weight, 1e-5), residual,
        ])  # fmt: skip
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_layer_that_only_looks_usual_goes_back_to_its_own(kind: str) -> None:
    config = GraniteConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, residual_multiplier=0.3, embedding_multiplier=12.0, pad_token_id=0,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GraniteForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    ours, cache, operators = wrapped(model, kind)
    originals = fused.fuse(ours, cache, operators)
    assert len(originals) == 2
    with pytest.raises(ModelUnusable):
        selfcheck.check(ours, cache)
    fused.undo(ours, originals)
    selfcheck.check(ours, cache)
