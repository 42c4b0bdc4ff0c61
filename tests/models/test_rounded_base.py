"""The base with its linears rounded to 8 or 4 bits: the same model but for the rounding, adapters beside it exact."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from manylora.errors import ModelUnusable
from manylora.kernels import native
from manylora.kernels.matmul import BaseMatmul, ReadableMatmul, Rounded, RoundedToNibbles, int8
from manylora.kernels.weights import FORMATS
from manylora.models import fused
from manylora.models.backends import Backend, choose
from manylora.models.kv_cache import KVCache
from manylora.models.linear import AdaptedLinear
from manylora.models.selfcheck import SelfCheck
from manylora.models.wrapping import wrap
from manylora.settings import Settings
from tests.engine.harness import load
from tests.kernels.lora_case import make_case
from tests.kernels.made import Made
from tests.tiny_models import make_tiny_model

if not native.is_available():
    pytest.skip("the C++ kernels are not installed", allow_module_level=True)

INT8 = choose(Settings(device="cpu", quantization="int8"))
INT4 = choose(Settings(device="cpu", quantization="int4"))
BY_TORCH = choose(Settings(device="cpu", quantization="int4", kernels="torch"))


@pytest.mark.parametrize(
    ("architecture", "backend"),
    [
        *((each, INT8) for each in ("llama", "qwen2", "phi3", "gpt2", "gemma2")),
        *((each, INT4) for each in ("llama", "qwen2", "gpt2")),
        ("llama", BY_TORCH),
    ],
)
def test_rounded_model_differs_from_the_whole_one_by_its_rounding_only(
    architecture: str, backend: Backend, tmp_path: Path
) -> None:
    ours = wrap(load(make_tiny_model(architecture, tmp_path)), backend)
    cache = KVCache(ours.survey.kv_shapes, 8, 4, torch.float32, torch.device("cpu"))
    ours.attach_cache(cache)
    rounded = SelfCheck(ours, cache)
    fused.exchange(ours, rounded.proven(fused.candidates(ours, cache)))

    rounded.check()

    ours.backend = replace(backend, format=FORMATS["none"])
    with pytest.raises(ModelUnusable, match="logits differ"):
        SelfCheck(ours, cache).check()


def test_a_rounded_linear_that_computes_something_else_is_named(tmp_path: Path) -> None:
    def mistaken(weight: torch.Tensor, bias: torch.Tensor | None) -> BaseMatmul:
        return int8(weight.roll(1, 0) if weight.shape == (64, 96) else weight, bias)

    with pytest.raises(ModelUnusable, match=r"layers\.0\.mlp\.down_proj cannot be kept in int8"):
        wrap(load(make_tiny_model("llama", tmp_path)), replace(INT8, matmul=mistaken))


def test_what_makes_the_logits_is_kept_in_8_bits_beside_a_base_in_4(tmp_path: Path) -> None:
    ours = wrap(load(make_tiny_model("llama", tmp_path)), INT4)
    kinds = {path: type(m.matmul) for path, m in ours.model.named_modules() if isinstance(m, AdaptedLinear)}

    assert kinds.pop("lm_head") is Rounded
    assert set(kinds.values()) == {RoundedToNibbles}


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_torch_multiplies_by_the_weights_that_the_cpp_kernels_hold(quantization: str) -> None:
    random = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(shape, generator=random) for shape in ((70, 96), (70,), (5, 96)))
    ours, theirs = (
        choose(Settings(device="cpu", quantization=quantization, kernels=kernels)).matmul(weight, bias)
        for kernels in ("auto", "torch")
    )
    assert isinstance(ours, ReadableMatmul)
    assert isinstance(theirs, ReadableMatmul)

    assert torch.equal(ours.rows(3, 67, 96), theirs.rows(3, 67, 96))
    torch.testing.assert_close(theirs(x), x @ theirs.rows(0, 70, 96).T + bias)
    # The C++ kernels round what comes to 8 bits too, which is off by 0.06 on the average of squares.
    torch.testing.assert_close(ours(x), theirs(x), rtol=0.02, atol=0.25)
    assert (ours(x) - theirs(x)).square().mean().sqrt() < 0.08


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_torch_reads_a_large_weight_back_part_by_part(quantization: str) -> None:
    """The same product, and nothing that it makes on the way is as large as the weight."""
    random = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(shape, generator=random) for shape in ((5000, 512), (5000,), (2, 3, 512)))
    matmul = choose(Settings(device="cpu", quantization=quantization, kernels="torch")).matmul(weight, bias)
    assert isinstance(matmul, ReadableMatmul)
    with Made() as made:
        found = matmul(x)

    torch.testing.assert_close(found, x @ matmul.rows(0, 5000, 512).T + bias, rtol=1e-5, atol=1e-4)
    assert max(each.nbytes for each in made.found) <= 2 << 20 < weight.nbytes / 4


def test_an_adapters_delta_is_made_from_the_input_as_it_was() -> None:
    case = make_case(torch.float32, [16], in_features=96, widths=(64,), rows=5, popularity="identical")
    weight = torch.randn(64, 96) / 10
    base = INT8.matmul(weight, None)(case.x)
    out = base.clone()
    native.add_lora_(out, case.x, *case.arguments())

    pair = case.weights[0][0]
    assert pair is not None
    assert pair.b is not None
    torch.testing.assert_close(out - base, case.x @ pair.a.T @ pair.b, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(base, case.x @ weight.T, rtol=1e-5, atol=1e-5)
