"""Which device is taken and what computes on it, as torch tells of devices that are not here."""

import sysconfig
from pathlib import Path

import pytest
import torch

from manylora.errors import InvalidSettings
from manylora.kernels.torch_lora import TorchKernel
from manylora.kernels.triton_lora import TritonKernel
from manylora.models.backends import choose, select_device
from manylora.settings import Settings, load_settings


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What Triton builds with, and nothing else: a folder with programs, and one with headers."""
    for place in ("bin/gcc", "include/Python.h"):
        (tmp_path / place).parent.mkdir()
        (tmp_path / place).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path / "include"))
    return tmp_path


@pytest.fixture
def entered(builder: Path, monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Two devices, of compute capability 9.0 and 7.5; the devices that threads have made their own."""
    found: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index == 1 else (9, 0))
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return found


def test_a_device_may_be_named_by_its_number(entered: list[torch.device]) -> None:
    assert select_device("auto") == select_device("cuda") == torch.device("cuda")
    assert select_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(InvalidSettings, match=r"no cuda:2 here. There is cuda:0, cuda:1\."):
        select_device("cuda:2")


def test_each_thread_that_computes_makes_the_device_its_own(entered: list[torch.device]) -> None:
    backend = choose(Settings(device="cuda:0"))
    assert entered == [torch.device("cuda", 0)]
    backend.before_step()
    assert entered == [torch.device("cuda", 0)] * 2
    choose(Settings(device="cuda")).before_step()
    assert len(entered) == 2, "torch's own is there without a number"


def test_programs_run_where_they_can(entered: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(choose(Settings(device="cuda")).lora, TritonKernel)
    assert isinstance(choose(Settings(device="cuda", kernels="torch")).lora, TorchKernel)
    assert isinstance(choose(Settings(device="cuda:1")).lora, TorchKernel), "too old for them"
    monkeypatch.setattr(torch.version, "cuda", None)  # as where torch was built for ROCm
    assert isinstance(choose(Settings(device="cuda")).lora, TorchKernel)


def test_torch_stands_in_where_programs_cannot_be_launched(
    entered: list[torch.device], builder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Triton builds a module for that: with the compiler that CC names, else gcc or clang, and Python's headers."""

    def kernel() -> type:
        caplog.clear()
        return type(choose(Settings(device="cuda")).lora)

    gcc, headers = builder / "bin" / "gcc", builder / "include" / "Python.h"
    gcc.rename(gcc.with_name("clang"))
    assert (kernel(), caplog.text) == (TritonKernel, "")
    gcc.with_name("clang").rename(gcc.with_name("tcc"))
    assert kernel() is TorchKernel
    [line] = caplog.messages
    assert "without a C compiler (gcc or clang on PATH)" in line
    assert "Install gcc" in line
    monkeypatch.setenv("CC", "tcc")
    assert (kernel(), caplog.text) == (TritonKernel, "")
    headers.unlink()
    assert kernel() is TorchKernel
    assert f"without {headers}:" in caplog.text
    headers.touch()
    monkeypatch.setenv("CC", "icc")
    assert kernel() is TorchKernel
    assert "without the C compiler that CC names" in caplog.text
    choose(Settings(device="cuda", kernels="torch"))
    assert len(caplog.messages) == 1, "who asked for torch is told nothing"


@pytest.mark.parametrize("device", ["cuda:", "cuda:x", "cuda:1\n", "cuda:-1", "cuda:1000", "tpu"])
def test_a_device_that_is_none_is_refused_by_name(device: str) -> None:
    with pytest.raises(InvalidSettings, match="device"):
        load_settings(device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_numbered_device_on_a_machine_without_any_is_an_error() -> None:
    with pytest.raises(InvalidSettings, match="no usable CUDA device"):
        select_device("cuda:1")
