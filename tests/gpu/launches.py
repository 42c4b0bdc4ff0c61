"""Launches of programs, noted instead of made, and what the compiler makes of them for a device that is not here."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float64: "fp64",
    torch.uint32: "u32",
    torch.bool: "i1",
}
_OPTIONS = {"num_warps", "num_stages"}


@dataclass(frozen=True)
class Launch:
    """A program, its grid, and its arguments as the compiler is told of them: types, constants, multiples of 16."""

    program: Any
    grid: tuple[int, ...]
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return str(self.program.__name__)


@dataclass(frozen=True)
class Code:
    """What a program was compiled to: the machine's instructions, and what it takes for itself."""

    instructions: str
    shared_bytes: int
    stack_bytes: int
    local_bytes: int

    def count(self, instruction: str) -> int:
        return len(re.findall(instruction, self.instructions))


@contextmanager
def noted() -> Iterator[list[Launch]]:
    """What would be launched in between; nothing is computed."""
    found: list[Launch] = []

    def note(program: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert not warmup
        found.append(_launch(program, grid, args, kwargs))

    with patch.object(JITFunction, "run", note):
        yield found


def _launch(program: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    options = {name: value for name, value in kwargs.items() if name in _OPTIONS}
    given = dict(zip(program.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k not in _OPTIONS}
    assert list(given) == program.arg_names or set(given) == set(program.arg_names), "each argument is given"
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: list[str] = []
    for parameter in program.params:
        name, value, is_free = parameter.name, given[parameter.name], parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not is_free):
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name] = "*" + _TYPES[value.dtype]
            if value.is_meta or isinstance(value, FakeTensor) or value.data_ptr() % 16 == 0:
                aligned.append(name)
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not is_free:
                aligned.append(name)
    return Launch(program, tuple(grid), types, constants, tuple(aligned), options)


def compiled(launch: Launch, capability: int) -> Code:
    """Compile a launch for a CUDA device, whose capability times ten is given."""
    at = {name: number for number, name in enumerate(launch.program.arg_names)}
    source = ASTSource(
        launch.program,
        launch.types,
        {(at[name],): value for name, value in launch.constants.items()},
        {(at[name],): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        read = [
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        ]
    taken = re.search(r"STACK:(\d+).*LOCAL:(\d+)", read[1])
    assert taken is not None
    return Code(read[0], int(made.metadata.shared), int(taken[1]), int(taken[2]))
