"""The base's matmul: which form of it a backend chooses, and those without the C++ kernels."""

import pytest
import torch

from manylora.kernels import matmul, native
from tests.engine.harness import BACKENDS, TORCH


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widened_weights_give_the_exact_product_rounded_once(rows: int, has_bias: bool, dtype: torch.dtype) -> None:
    if not matmul.can_pack(torch.float32):
        pytest.skip("this torch has no oneDNN")
    random = torch.Generator().manual_seed(rows)
    x, weight, bias = (torch.randn(shape, generator=random).to(dtype) for shape in ((rows, 96), (50, 96), (50,)))
    exact = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
    actual = matmul.widened(weight, bias if has_bias else None)(x)
    assert actual.dtype is dtype
    step = torch.finfo(dtype).eps * exact.abs() / 2  # half a unit in the last place, at most
    assert ((actual.double() - exact).abs() <= step + 1e-5).all()


def test_every_dtype_gets_a_matmul_that_computes_the_product() -> None:
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=random) for shape in ((5, 64), (32, 64)))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        actual = TORCH.matmul(weight.to(dtype), None)(x.to(dtype))
        torch.testing.assert_close(actual.float(), x @ weight.T, rtol=0.02, atol=0.1)


def test_bfloat16_goes_to_onednn_where_the_cpu_has_a_matrix_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.ones(32, 64, dtype=torch.bfloat16)
    if not native.is_available() or not matmul.can_pack(torch.float32):
        pytest.skip("needs the C++ kernels and oneDNN")
    chosen: list[str] = []
    for name in ("packed", "paneled"):
        monkeypatch.setattr(matmul, name, lambda weight, bias, name=name: chosen.append(f"{name} {weight.dtype}"))
    monkeypatch.setattr(matmul, "can_pack", lambda dtype: True)
    for has_unit in (False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has_unit=has_unit: {"amx_bf16": has_unit})
        for dtype in (torch.bfloat16, torch.float32):
            BACKENDS["fused"].matmul(weight.to(dtype), None)
    assert chosen == [
        "paneled torch.bfloat16",
        "paneled torch.float32",
        "packed torch.bfloat16",
        "paneled torch.float32",
    ]
