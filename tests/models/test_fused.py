"""Layers of the usual shape run fused, and only where they compute the same."""

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GraniteConfig, GraniteForCausalLM, PreTrainedModel

from manylora.errors import ModelUnusable
from manylora.kernels import native
from manylora.kernels.batch import AttentionOptions, ForwardContext
from manylora.kernels.interface import SiteGroup
from manylora.kernels.matmul import MatmulFactory, int4, int8, packed, paneled
from manylora.kernels.rows import group_rows
from manylora.lora.memory.device_memory import DTYPE_CODES, DeviceMemory, TableEntry
from manylora.models import fused
from manylora.models.backends import Backend
from manylora.models.kv_cache import KVCache, KVShape
from manylora.models.layers import LayerKernel, LayerParts, Norm
from manylora.models.linear import AdaptedLinear, KeptLinear
from manylora.models.native_layers import NativeLayers
from manylora.models.selfcheck import SelfCheck, single_sequence
from manylora.models.wrapping import WrappedModel, wrap
from tests.engine.harness import BACKENDS, load
from tests.tiny_models import make_tiny_model

S = TypeVar("S")
CPU = torch.device("cpu")


@pytest.fixture(params=["fused", "torch"])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param not in BACKENDS:
        pytest.skip("the C++ kernels are not installed")
    return BACKENDS[request.param]


def wrapped(model: PreTrainedModel, backend: Backend) -> tuple[WrappedModel, KVCache]:
    ours = wrap(model, backend)
    cache = KVCache(ours.survey.kv_shapes, 8, 4, model.dtype, CPU)
    ours.attach_cache(cache)
    return ours, cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2"])
def test_usual_layers_are_fused_and_compute_the_same(
    architecture: str, dtype: torch.dtype, backend: Backend, tmp_path: Path
) -> None:
    ours, cache = wrapped(load(make_tiny_model(architecture, tmp_path)).to(dtype), backend)
    check = SelfCheck(ours, cache)
    proven = check.proven(fused.candidates(ours, cache))
    assert len(proven) == len(cache.keys)
    fused.exchange(ours, proven)
    check.check()


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "qwen3", "phi3", "gpt2", "gpt_neox"])
def test_other_layers_are_left_alone(architecture: str, backend: Backend, tmp_path: Path) -> None:
    ours, cache = wrapped(load(make_tiny_model(architecture, tmp_path)), backend)
    assert fused.candidates(ours, cache) == {}
    SelfCheck(ours, cache).check()


def test_a_layer_with_a_linear_that_computes_in_its_own_way_is_left_alone_by_the_cpp_kernels(
    backend: Backend, tmp_path: Path
) -> None:
    ours, cache = wrapped(load(make_tiny_model("llama", tmp_path)), backend)
    path = "model.layers.0.mlp.down_proj"
    ours_down = ours.model.get_submodule(path)
    assert isinstance(ours_down, AdaptedLinear)
    own = nn.Linear(ours_down.in_features, ours_down.out_features, bias=False)
    kept = KeptLinear(own, ours_down.group, ours.context, in_features=own.in_features, on_logit_rows=False)
    ours.model.set_submodule(path, kept)
    runs_it = not isinstance(backend.layers, NativeLayers)
    assert ("model.layers.0" in fused.candidates(ours, cache)) is runs_it
    assert "model.layers.1" in fused.candidates(ours, cache)


@pytest.mark.parametrize("matmul", [paneled, packed, int8, int4])
def test_layer_in_cpp_is_its_operators_one_after_the_other(matmul: MatmulFactory, tmp_path: Path) -> None:
    """Whichever kind of matmul it holds, and with an adapter on half of its linears."""
    if not native.is_available():
        pytest.skip("the C++ kernels are not installed")
    outputs = []
    for is_fused in (False, True):
        torch.manual_seed(0)
        ours, cache = wrapped(load(make_tiny_model("qwen2", tmp_path)), replace(BACKENDS["fused"], matmul=matmul))
        if is_fused:
            found = fused.candidates(ours, cache)
            assert len(found) == len(cache.keys)
            fused.exchange(ours, found)
        outputs.append(run_with_adapter(ours, cache))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)


def run_with_adapter(ours: WrappedModel, cache: KVCache) -> torch.Tensor:
    """Logits of twelve rows: the middle ones have an adapter for o_proj, k_proj and down_proj, and none elsewhere."""
    random = torch.Generator().manual_seed(1)
    memory = DeviceMemory(len(ours.modules), 2, torch.device("cpu"))
    held = []
    for path, site in ours.sites.items():
        if path.endswith(("o_proj", "k_proj", "down_proj")):
            spec = ours.modules[path]
            a = torch.randn(4, spec.in_features, generator=random)
            b = torch.randn(4, spec.out_features, generator=random)
            held += [a, b]
            entry = TableEntry(
                a.data_ptr(), b.data_ptr(), 4, 0, DTYPE_CODES[torch.float32], spec.in_features, spec.out_features
            )
            memory.tables[site, 1] = torch.tensor(entry)
            memory.ranks[site, 1] = 4
    rows = group_rows(np.array([-1] * 4 + [1] * 5 + [-1] * 3, dtype=np.int32), memory.ranks, torch.device("cpu"))
    assert rows is not None
    batch = single_sequence(torch.arange(12), 0, cache)
    ours.context.batch = replace(batch, lora=ours.backend.lora.plan(rows, memory))
    with torch.inference_mode():
        logits: torch.Tensor = ours.model(
            input_ids=batch.token_ids[None], position_ids=batch.positions[None], use_cache=False
        ).logits
    ours.context.batch = None
    assert len(held) > 0
    return logits


@pytest.mark.parametrize("start", [0, 6])
def test_partial_rotary_embedding_agrees(start: int) -> None:
    """Torch's layer against the C++ one where only half of each head is turned."""
    if not native.is_available():
        pytest.skip("the C++ kernels are not installed")
    random = torch.Generator().manual_seed(start)
    rows, heads, num_kv, dim, block, rotary_dim = 5, 4, 2, 8, 4, 4
    batch = single_sequence(
        torch.arange(rows), start, KVCache([KVShape(num_kv, dim, dim)], 8, block, torch.float32, CPU)
    )
    hidden = heads * dim
    context = ForwardContext(batch)

    def adapted(inputs: int, outputs: int, site: int) -> AdaptedLinear:
        group = SiteGroup(site, (0, outputs), torch.tensor([0, outputs], dtype=torch.int32))
        weight = torch.randn(outputs, inputs, generator=random) / inputs**0.5
        return AdaptedLinear(paneled(weight, None), group, context, in_features=inputs)

    def norm() -> Norm:
        group = SiteGroup(4, (0, hidden), torch.tensor([0, hidden], dtype=torch.int32))
        return Norm(torch.randn(hidden, generator=random), 1e-5, group)

    parts = LayerParts(
        norm(), adapted(hidden, hidden + 2 * num_kv * dim, 0), adapted(hidden, hidden, 1),
        norm(), adapted(hidden, 48, 2), adapted(24, hidden, 3), AttentionOptions(0.3, 3, 0.0),
    )  # fmt: skip
    cos, sin = (torch.randn(rows, rotary_dim, generator=random) for _ in "cs")
    given = torch.randn(rows, hidden, generator=random)
    past = [torch.randn(8, num_kv, block, dim, generator=random) for _ in "kv"]

    def run(kernel: LayerKernel[S]) -> list[torch.Tensor]:
        keys, values = (cache.clone() for cache in past)
        residual = given.clone()
        layer = kernel.layer(parts, keys, values)
        assert layer is not None
        layer(residual, kernel.begin(cos, sin, batch))
        return [residual, keys, values]

    for theirs, ours in zip(run(BACKENDS["fused"].layers), run(BACKENDS["torch"].layers), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_layer_that_only_looks_usual_goes_back_to_its_own(backend: Backend) -> None:
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
    ours, cache = wrapped(model, backend)
    found, check = fused.candidates(ours, cache), SelfCheck(ours, cache)
    assert len(found) == 2
    assert check.proven(found) == {}
    check.check()
    fused.exchange(ours, found)
    with pytest.raises(ModelUnusable):
        check.check()
