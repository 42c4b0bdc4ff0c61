"""The base's numbers are read back out of every form that it is served in."""

from pathlib import Path

import numpy as np
import pytest
import torch

from manylora.kernels import matmul, native
from manylora.kernels.weights import pack_int8
from manylora.lora.format.lora_terms import LoraParts, lora_terms
from manylora.lora.format.spec import LowRank, ModuleSpec, Output
from manylora.lora.format.tensors import TensorView
from manylora.models.served_base import ROWS_AT_A_TIME, ServedEmbedding, ServedLinear, ServedNorm
from tests.conftest import ModelMaker
from tests.engine.harness import BACKENDS, build_rig, load

FORMS = {"dense": matmul.dense, "packed": matmul.packed, "paneled": matmul.paneled, "int8": matmul.int8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_a_linears_weight_is_what_it_multiplies_by(form: str, dtype: torch.dtype) -> None:
    if form in ("paneled", "int8") and not native.is_available():
        pytest.skip("the C++ kernels are not installed")
    if form == "packed" and not matmul.can_pack(dtype):
        pytest.skip("oneDNN has no kernels of this type here")
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(203, 97, generator=g).to(dtype), torch.randn(203, generator=g).to(dtype)
    made = FORMS[form](weight, bias)
    kept = pack_int8(weight).dequantised() if form == "int8" else weight.float()
    for first, width in ((0, 203), (0, 64), (70, 90), (190, 13)):
        served = ServedLinear(made, first, width, 97, bias[first : first + width])
        mine = kept[first : first + width].numpy()
        np.testing.assert_array_equal(served.weight(), mine)
        np.testing.assert_allclose(served.squared_norms(), (mine * mine).sum(axis=1), rtol=1e-5)
        rows = torch.randn(3, 97, generator=g).numpy()
        np.testing.assert_allclose(served.project(rows), rows @ mine.T, rtol=1e-4, atol=1e-4)
        assert served.bias is not None
        np.testing.assert_array_equal(served.bias, bias[first : first + width].float().numpy())


def test_a_product_of_another_kind_is_asked_with_unit_vectors() -> None:
    weight, bias = torch.randn(40, 24), torch.randn(40)
    served = ServedLinear(lambda x: x @ weight.T + bias, 8, 16, 24, bias[8:24])
    np.testing.assert_allclose(served.weight(), weight[8:24].numpy(), atol=1e-5)


def test_large_weights_are_read_in_pieces() -> None:
    table = torch.randn(7, 2 * ROWS_AT_A_TIME + 5)
    served = ServedEmbedding(table)
    np.testing.assert_array_equal(served.weight(), table.T.numpy())
    assert served.squared_norms().shape == (2 * ROWS_AT_A_TIME + 5,)


@pytest.mark.parametrize(("architecture", "offset"), [("llama", 0.0), ("gemma2", 1.0), ("gpt2", 0.0)])
def test_a_norms_gain_is_its_weight_with_the_models_offset(
    architecture: str, offset: float, tiny_model_dir: ModelMaker
) -> None:
    model = load(tiny_model_dir(architecture))
    weights = {name.removesuffix(".weight"): each.detach().clone() for name, each in model.named_parameters()}
    rig = build_rig(model)
    rig.close()
    norms = {path: each for path, each in rig.wrapped.served.items() if isinstance(each, ServedNorm)}
    assert len(norms) >= 5
    for path, served in norms.items():
        assert served.weight_offset == offset
        np.testing.assert_allclose(served.weight()[:, 0], weights[path].numpy() + offset, rtol=1e-6)
        assert (served.bias is None) == (architecture != "gpt2")


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_module_of_a_model_is_there(backend: str, tiny_llama_dir: Path) -> None:
    model = load(tiny_llama_dir)
    weights = {name.removesuffix(".weight"): each.detach().clone() for name, each in model.named_parameters()}
    rig = build_rig(model, kernel=backend)
    rig.close()
    assert rig.wrapped.served.keys() == rig.wrapped.modules.keys() == weights.keys()
    for path, served in rig.wrapped.served.items():
        kept = weights[path].T if rig.wrapped.modules[path].kind == "embedding" else weights[path]
        np.testing.assert_array_equal(served.weight(), kept.reshape(len(kept), -1).numpy())


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_doras_lengths_are_those_of_the_weight_that_is_served(form: str, has_bias: bool) -> None:
    if form != "dense" and not native.is_available():
        pytest.skip("the C++ kernels are not installed")
    g = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(203, 97, generator=g) / 10, torch.randn(203, generator=g) if has_bias else None
    a, b, magnitude = (torch.randn(*shape, generator=g) for shape in ((4, 97), (203, 4), (203,)))
    parts = LoraParts("q", "linear", 4, 0.5, *(_view(each) for each in (a, b, magnitude)))
    low, output = lora_terms(ModuleSpec("q", "linear", 97, 203), parts, None)
    assert isinstance(low, LowRank)
    assert isinstance(output, Output)
    assert output.scale is not None
    assert output.shift is not None
    served = ServedLinear(FORMS[form](weight, bias), 0, 203, 97, bias)
    kept = pack_int8(weight).dequantised() if form == "int8" else weight
    factor = magnitude / (kept + 0.5 * b @ a).norm(dim=1)
    np.testing.assert_allclose(output.scale.values(served), factor.numpy(), rtol=2e-5)
    shift = (bias * (1 - factor)).numpy() if bias is not None else np.zeros(203)
    np.testing.assert_allclose(output.shift.values(served), shift, rtol=2e-4, atol=1e-5)


def _view(tensor: torch.Tensor) -> TensorView:
    return TensorView("F32", tuple(tensor.shape), memoryview(tensor.numpy().tobytes()))
