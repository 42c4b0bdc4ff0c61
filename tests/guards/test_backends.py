"""Kernels are chosen in one place, and know nothing of what they are used for."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from manylora.lora.memory.terms import NumberFormat
from manylora.settings import Settings

PACKAGE = Path(__file__).parents[2] / "server" / "manylora"
# Where a device's kind and a number format may decide. Training (`lifecycle/`) runs the untouched model, by no backend.
HOMES = {"models/backends.py", "kernels/weights.py"}
UNUSED = "lifecycle/"


def literals(setting: str) -> set[str]:
    """What a setting may be by name; a device may have a number besides."""
    kind = Settings.model_fields[setting].annotation
    named = next(each for each in (kind, *get_args(kind)) if get_origin(each) is Literal)
    return set(get_args(named)) - {"auto", "none"}


KINDS = literals("device") | literals("kernels") | literals("quantization") | {"native", "cpp", "triton", "meta", "mps"}
FORMATS = set(get_args(NumberFormat)) | literals("quantization")
CLASSES = {
    *("Whole", "Int8", "Int4", "PanelWeight", "Int8Weight", "Int4Weight"),
    *("Paneled", "Packed", "Rounded", "RoundedToNibbles", "Unpacked", "TorchKernel", "NativeKernel"),
}
ASKING = {"is_cuda", "is_cpu", "is_available"}


def decisions(tree: ast.AST) -> Iterator[int]:
    """Lines that compare a device's kind, a kernel's name or a number format, or ask what is there."""
    for node in ast.walk(tree):
        match node:
            case ast.Compare() | ast.MatchValue():
                for part in ast.walk(node):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value in KINDS | FORMATS:
                        yield node.lineno
                    if isinstance(part, ast.Attribute) and part.attr in FORMATS:
                        yield node.lineno
            case ast.Call(func=ast.Name(id="isinstance"), args=[_, kinds]):
                if any(isinstance(part, ast.Name) and part.id in CLASSES for part in ast.walk(kinds)):
                    yield node.lineno
            case ast.MatchClass(cls=ast.Name(id=name)):
                if name in CLASSES:
                    yield node.lineno
            case ast.Attribute(attr=attr, value=ast.Attribute(attr="cuda")) if attr in ASKING:
                yield node.lineno
            case ast.Attribute(attr=attr, value=ast.Name(id="native")) if attr in ASKING:
                yield node.lineno


def test_one_module_chooses_the_kernels() -> None:
    found = [
        f"{name}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if (name := path.relative_to(PACKAGE).as_posix()) not in HOMES and not name.startswith(UNUSED)
        for line in decisions(ast.parse(path.read_text(encoding="utf-8")))
    ]

    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "if device.type == 'cpu': pass",
        "x = 1 if settings.kernels != 'torch' else 2",
        "if kernel.name in ('native', 'other'): pass",
        "if settings.quantization == 'int8': pass",
        "if weight.dtype is torch.bfloat16: pass",
        "if own in (torch.float16, torch.float32): pass",
        "if isinstance(matmul, (Paneled, Other)): pass",
        "match matmul:\n  case Int8Weight(): pass",
        "match settings.kernels:\n  case 'torch': pass",
        "if torch.cuda.is_available(): pass",
        "if native.is_available(): pass",
    ],
)
def test_the_rule_sees_each_way_to_decide(source: str) -> None:
    assert list(decisions(ast.parse(source)))


def imports_of(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_only_programs_and_what_launches_them_import_triton() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in sorted(PACKAGE.rglob("*.py"))
        if any(name.split(".")[0] == "triton" for name in imports_of(ast.parse(path.read_text(encoding="utf-8"))))
    }

    assert {name for name in found if not re.fullmatch(r"kernels/(programs/\w+|triton_\w+)\.py", name)} == set()
    assert found, "the names above are those of modules that there are"


def test_programs_calculate_in_float32() -> None:
    """The interpreter takes the bits of a bfloat16 for a number; the helpers widen what they multiply there."""
    for path in sorted((PACKAGE / "kernels" / "programs").glob("*.py")):
        dots = [
            (path.name, node.lineno)
            for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(function, ast.FunctionDef) and not function.name.startswith("_dot")
            for node in ast.walk(function)
            if isinstance(node, ast.Attribute) and node.attr == "dot"
        ]
        assert dots == [], "products are made by the helpers, which know what the interpreter does"


@pytest.mark.parametrize("choice", ["torch", "auto"])
def test_a_cpu_needs_no_triton(choice: str) -> None:
    """Torch itself imports it where it is there, so it is taken away."""
    script = """
import sys
sys.modules["triton"] = None
from manylora.models.backends import choose
from manylora.settings import Settings
import manylora.engine.build
backend = choose(Settings(device="cpu", kernels=sys.argv[1]))
assert not any(name.startswith("manylora.kernels.triton") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script, choice], check=True)


def test_kernels_know_no_request() -> None:
    words = re.compile(
        r"\b(requests?|tenants?|https?|engine|scheduler|clients?|servers?|uploads?|catalog)\b", re.IGNORECASE
    )
    files = [*(PACKAGE / "kernels").glob("*.py"), *(PACKAGE / "csrc").rglob("*.*")]
    found = [
        f"{path.relative_to(PACKAGE)}: {word}"
        for path in files
        for word in words.findall(re.sub(r"\S*/\S*", "", path.read_text(encoding="utf-8")))
    ]

    assert files
    assert found == []
