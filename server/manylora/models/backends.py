"""What computes a model: chosen once, here, from the settings and the device. Nothing else asks what a device is.

A backend is one object. Another device, or another way to keep a base, is another creator below and no branch anywhere:
who needs a part of it (the engine's builder, tests, benchmarks) takes it from there. What one of them alone needs is
imported by its creator, so that a machine without it never pays.
"""

import importlib.util
import logging
import os
import shutil
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import psutil
import torch

from manylora.errors import InvalidSettings
from manylora.kernels import kv_entries, matmul, native
from manylora.kernels.cpu import cpu_multiplies
from manylora.kernels.interface import Attention, LoraKernel
from manylora.kernels.matmul import BaseMatmul, MatmulFactory
from manylora.kernels.weights import FORMATS, Tolerance, WeightFormat
from manylora.lora.memory.device_memory import Allocate
from manylora.lora.memory.pages import zeros
from manylora.models.layers import LayerKernel

if TYPE_CHECKING:
    from manylora.settings import Settings

__all__ = ["Backend", "choose", "choose_whole", "free_bytes", "has_bfloat16", "select_device", "select_dtype", "triton"]

DeviceName = Literal["auto", "cpu", "cuda"]
# NVIDIA's: matrix instructions of bfloat16, and copies to shared memory that run ahead.
_LEAST_CAPABILITY: Final = (8, 0)
DtypeName = Literal["auto", "bfloat16", "float16", "float32"]
_KV_DTYPES: Final[Mapping[str, torch.dtype | None]] = {"auto": None, "int8": torch.int8}
# What makes the logits is kept in another format than the rest: to round it costs most and saves little.
_HEADS: Final[Mapping[str, str]] = {"int4": "int8"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Backend:
    """The parts that compute a model on `device`.

    `matmul` makes the linears of the base, whose weights it keeps in `format`, but for those that make the logits,
    which are `head`'s, and `experts`' of the experts of a mixture, which are never rounded; None leaves these to the
    model's own code. `attention` serves the model's own layers, `layers` takes the place of those of the usual shape,
    `lora` adds the adapters' deltas; `allocate` gives the memory that adapters lie in. `before_step` is called on the
    thread that steps, before each step. `kv_dtype`: what keys and values are kept in; None is what the model computes
    in.
    """

    device: torch.device
    format: WeightFormat
    matmul: MatmulFactory
    head: MatmulFactory
    attention: Attention
    layers: LayerKernel[Any]
    lora: LoraKernel
    allocate: Allocate
    before_step: Callable[[], None]
    kv_dtype: torch.dtype | None = None
    experts: MatmulFactory | None = None

    @property
    def head_format(self) -> WeightFormat:
        """What the weights of `head` are kept in."""
        return FORMATS[_HEADS.get(self.format.name, self.format.name)]

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type of the KV cache of a model that computes in `dtype`."""
        return self.kv_dtype or dtype

    def tolerance(self, dtype: torch.dtype) -> Tolerance:
        """How far a model that computes in `dtype` may be from the untouched one."""
        own = self.format.tolerance(dtype)
        return own if self.kv_dtype is None else own.widened(kv_entries.ROUNDED)


def choose(settings: "Settings") -> Backend:
    """The backend that the settings ask for, on the device that they name.

    Raises InvalidSettings where there is no such device, or where it cannot keep the base's weights as they say; what
    the profile alone says of them is for CPUs.
    """
    device = select_device(settings.device)
    if device.type != "cpu":
        settings = settings.yielding("quantization", "kv_cache_dtype")
    wanted = FORMATS[settings.quantization]
    kv_dtype = _KV_DTYPES[settings.kv_cache_dtype]
    if device.type != "cpu":
        if kv_dtype is not None:
            raise InvalidSettings("kv_cache_dtype: int8 is for CPUs. Leave it out, or choose --device cpu.")
        has_programs = settings.kernels != "torch" and _runs_programs(device)
        return triton(device, wanted) if has_programs else _torch_on_gpu(device, wanted)
    is_native = settings.kernels != "torch" and native.is_available()
    backend = _cpp(device, wanted) if is_native else _torch_on_cpu(device, wanted)
    return replace(backend, kv_dtype=kv_dtype)


def choose_whole(settings: "Settings", kind: str) -> Backend:
    """`choose` for a kind of model, in words, whose weights and cache are never rounded.

    Raises InvalidSettings as well where somebody asks for that; what the profile alone says is for other models.
    """
    settings = settings.yielding("quantization", "kv_cache_dtype")
    if settings.quantization != "none":
        raise InvalidSettings(f"quantization: {kind} are served as they are. Leave it out.")
    if settings.kv_cache_dtype != "auto":
        raise InvalidSettings(f"kv_cache_dtype: {kind} keep no rounded cache. Leave it out.")
    return choose(settings)


def _cpp(device: torch.device, wanted: WeightFormat) -> Backend:
    """The C++ kernels."""
    from manylora.kernels.native_attention import NativeAttention
    from manylora.kernels.native_lora import NativeKernel
    from manylora.kernels.placement import ThreadPlacement
    from manylora.models.native_layers import NativeLayers

    held: Mapping[str, MatmulFactory] = {"none": _panels, "int8": matmul.int8, "int4": matmul.int4}
    return Backend(
        device=device,
        format=wanted,
        matmul=held[wanted.name],
        head=held[_HEADS.get(wanted.name, wanted.name)],
        attention=NativeAttention(),
        layers=NativeLayers(),
        lora=NativeKernel(),
        allocate=zeros,
        before_step=ThreadPlacement(native).before_step,
        experts=_panels,
    )


def triton(device: torch.device, wanted: WeightFormat) -> Backend:
    """Torch's matmuls, and programs in Triton for what stands between them: on a GPU, or in Triton's interpreter."""
    from manylora.kernels.triton_attention import TritonAttention
    from manylora.kernels.triton_lora import TritonKernel
    from manylora.models.triton_layers import TritonLayers

    attention = TritonAttention()
    _enter(device)  # of the thread that checks the model
    return replace(
        _torch_on_gpu(device, wanted),
        attention=attention,
        layers=TritonLayers(attention),
        lora=TritonKernel(),
        before_step=partial(_enter, device),
    )


def _enter(device: torch.device) -> None:
    """Make it the thread's own: programs are launched on that, wherever their tensors are."""
    if device.index is not None:
        torch.cuda.set_device(device)


def _runs_programs(device: torch.device) -> bool:
    """Whether Triton is there, which torch brings with CUDA, and makes matrix products of 16 bits on this device.

    Where nothing but a compiler is missing, that is logged.
    """
    is_known = torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
    if not is_known or importlib.util.find_spec("triton") is None:
        return False
    missing = _missing_to_build()
    if missing is not None:
        _log.warning(
            "Triton cannot build what launches its programs, without %s: using the slower torch operations. "
            "Install gcc and Python's headers (on Debian gcc, libc6-dev and python3-dev), and start again.",
            missing,
        )
    return missing is None


def _missing_to_build() -> str | None:
    """What Triton compiles a C module with when it first comes to a device, and does not find; None if it is there."""
    said = os.environ.get("CC")  # which it takes in any case
    if not any(shutil.which(name) for name in (("gcc", "clang") if said is None else (said,))):
        return "a C compiler (gcc or clang on PATH)" if said is None else "the C compiler that CC names"
    headers = Path(sysconfig.get_path("include", "posix_prefix"))
    return None if (headers / "Python.h").is_file() else f"{headers / 'Python.h'}"


def _torch_on_cpu(device: torch.device, wanted: WeightFormat) -> Backend:
    """Torch operations on a CPU. Rounded weights take no more room here than there, and more time."""
    held: Mapping[str, MatmulFactory] = {
        "none": _by_onednn,
        "int8": matmul.unpacked_int8,
        "int4": matmul.unpacked_int4,
    }
    made = _torch(device, wanted, held, zeros, multiplies=cpu_multiplies, sums_in_bags=True)
    return replace(made, experts=_by_onednn)


def _torch_on_gpu(device: torch.device, wanted: WeightFormat) -> Backend:
    """Torch operations on a device that has instructions for every type and memory of its own."""
    if wanted.name != "none":
        raise InvalidSettings(f"quantization: {wanted.name} is for CPUs. Leave it out, or choose --device cpu.")

    def allocate(numel: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(numel, dtype=dtype, device=device)

    return _torch(device, wanted, {"none": matmul.dense}, allocate, multiplies=lambda _: True, sums_in_bags=False)


def _torch(
    device: torch.device,
    wanted: WeightFormat,
    held: Mapping[str, MatmulFactory],
    allocate: Allocate,
    *,
    multiplies: Callable[[torch.dtype], bool],
    sums_in_bags: bool,
) -> Backend:
    from manylora.kernels.torch_attention import TorchAttention
    from manylora.kernels.torch_lora import TorchKernel
    from manylora.models.torch_layers import TorchLayers

    attention = TorchAttention(multiplies)
    return Backend(
        device=device,
        format=wanted,
        matmul=held[wanted.name],
        head=held[_HEADS.get(wanted.name, wanted.name)],
        attention=attention,
        layers=TorchLayers(attention),
        lora=TorchKernel(multiplies, sums_in_bags=sums_in_bags),
        allocate=allocate,
        before_step=lambda: None,
    )


def _panels(weight: torch.Tensor, bias: torch.Tensor | None) -> BaseMatmul:
    """Our own panels.

    Torch's matmul brings a weight into another order in every call, which costs more than the product while the rows
    are few, and oneDNN's, which need not, reads bfloat16 at half the memory's rate. But where the CPU has a unit for
    bfloat16 matrices (AMX), oneDNN uses it and we do not.
    """
    has_matrix_unit = bool(torch.cpu.get_capabilities().get("amx_bf16"))
    if weight.dtype is torch.bfloat16 and has_matrix_unit and matmul.can_pack(weight.dtype):
        return matmul.packed(weight, bias)
    return matmul.paneled(weight, bias)


def _by_onednn(weight: torch.Tensor, bias: torch.Tensor | None) -> BaseMatmul:
    """OneDNN's order; of 16-bit weights for which it has no kernels here, as float32."""
    if matmul.can_pack(weight.dtype):
        return matmul.packed(weight, bias)
    return matmul.widened(weight, bias) if matmul.can_pack(torch.float32) else matmul.dense(weight, bias)


def select_device(device: str) -> torch.device:
    """`auto` is CUDA where there is some, and `cuda:1` the second of several.

    Raises InvalidSettings where CUDA, or that one, is asked for and missing.
    """
    has_cuda = torch.cuda.is_available()
    if device == "auto":
        return torch.device("cuda" if has_cuda else "cpu")
    found = torch.device(device)
    if found.type == "cuda" and not has_cuda:
        raise InvalidSettings(
            "device: there is no usable CUDA device. Use --device cpu, or install a CUDA build of torch."
        )
    if found.index is not None and found.index >= torch.cuda.device_count():
        numbers = ", ".join(f"cuda:{number}" for number in range(torch.cuda.device_count()))
        raise InvalidSettings(f"device: there is no {device} here. There is {numbers}.")
    return found


def select_dtype(dtype: DtypeName, device: torch.device, own: torch.dtype | None = None) -> torch.dtype:
    """`auto` on a CPU is bfloat16 where it has instructions for it, else float32; on CUDA it is the model's `own`."""
    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    if device.type == "cpu":
        return torch.bfloat16 if has_bfloat16(torch.cpu.get_capabilities()) else torch.float32
    return own if own in (torch.bfloat16, torch.float16, torch.float32) else torch.bfloat16


def has_bfloat16(capabilities: Mapping[str, Any]) -> bool:
    """Whether a CPU multiplies bfloat16 by itself, from `torch.cpu.get_capabilities()`."""
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def total_bytes(device: torch.device) -> int:
    """The memory that `device` has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return int(psutil.virtual_memory().total)


def free_bytes(device: torch.device) -> int:
    """The memory that is free on `device` now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
