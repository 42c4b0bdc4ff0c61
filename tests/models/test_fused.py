"""Layers of the usual shape run fused, and only where they compute the same."""

from pathlib import Path

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM, PreTrainedModel

from manylora.errors import ModelUnusable
from manylora.models import fused, native, selfcheck
from manylora.models.kv_cache import KVCache
from manylora.models.matmul import factory
from manylora.models.wrapping import WrappedModel, wrap
from tests.engine.harness import load
from tests.tiny_models import make_tiny_model

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the C++ kernels are not installed")


def wrapped(model: PreTrainedModel) -> tuple[WrappedModel, KVCache]:
    ours = wrap(model, factory(use_native=True))
    cache = KVCache(ours.survey.kv_shapes, 8, 4, model.dtype, torch.device("cpu"))
    ours.attach_cache(cache, use_native=True)
    return ours, cache


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2"])
def test_usual_layers_are_fused_and_compute_the_same(architecture: str, tmp_path: Path) -> None:
    ours, cache = wrapped(load(make_tiny_model(architecture, tmp_path)))
    assert len(fused.fuse(ours, cache)) == len(cache.keys)
    selfcheck.check(ours, cache)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "qwen3", "phi3", "gpt2", "gpt_neox"])
def test_other_layers_are_left_alone(architecture: str, tmp_path: Path) -> None:
    ours, cache = wrapped(load(make_tiny_model(architecture, tmp_path)))
    assert fused.fuse(ours, cache) == {}
    selfcheck.check(ours, cache)


def test_layer_that_only_looks_usual_goes_back_to_its_own() -> None:
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
    ours, cache = wrapped(model)
    originals = fused.fuse(ours, cache)
    assert len(originals) == 2
    with pytest.raises(ModelUnusable):
        selfcheck.check(ours, cache)
    fused.undo(ours, originals)
    selfcheck.check(ours, cache)
