"""Which matmuls torch's build and the CPU are said to have instructions for."""

from types import SimpleNamespace

import pytest
import torch

from manylora.kernels.cpu import cpu_multiplies


@pytest.mark.parametrize("is_supported", [True, False])
def test_bfloat16_is_multiplied_where_onednn_says_so(monkeypatch: pytest.MonkeyPatch, *, is_supported: bool) -> None:
    operators = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: is_supported)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    assert cpu_multiplies(torch.bfloat16) is is_supported
    assert cpu_multiplies(torch.float32)
    assert not cpu_multiplies(torch.float16)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not cpu_multiplies(torch.bfloat16)


def test_torch_without_onednn_is_not_asked_for_its_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> bool:
        raise RuntimeError("not built")

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_is_mkldnn_bf16_supported=fail))
    assert not cpu_multiplies(torch.bfloat16)
    assert cpu_multiplies(torch.float32)


def test_onednn_without_the_question_has_no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    assert not cpu_multiplies(torch.bfloat16)
