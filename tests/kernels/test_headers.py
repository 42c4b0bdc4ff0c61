"""Every header of a CPU path can be opened alone, for each instruction set, and takes nothing but what it includes."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from manylora.kernels import native

PATHS = Path(native.__file__).parents[1] / "csrc" / "paths"
HEADERS = sorted(path.name for path in PATHS.glob("*.h"))
COMPILER = shutil.which("g++")
FLAGS = ("-O1", "-std=c++20", "-fopenmp", "-Wall", "-Werror", "-Wno-psabi", "-Wno-unused-function", "-Wno-attributes")


def compile_(*arguments: str) -> None:
    assert COMPILER
    done = subprocess.run([COMPILER, *FLAGS, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="needs g++")
@pytest.mark.parametrize("cpu_path", native.CPU_PATHS)
def test_headers_compile_alone(cpu_path: str, tmp_path: Path) -> None:
    shutil.copytree(PATHS, tmp_path / "paths")
    shutil.copy(PATHS.parent / "kernels.h", tmp_path)
    path = f"-DML_PATH=ML_{cpu_path.upper()}"
    # What all begin with, which is most of what there is to read, is compiled once, and so stands first in each source.
    target = tmp_path / "paths" / "target.h"
    compile_(path, "-w", "-x", "c++-header", str(target), "-o", f"{target}.gch")
    for header in HEADERS:
        alone = tmp_path / "paths" / "alone.cpp"
        alone.write_text(f'#include "target.h"\n#include "{header}"\n#include "{header}"\n')
        compile_(path, "-fsyntax-only", str(alone))


def test_standard_headers_come_before_the_target_only() -> None:
    """Their inline functions are shared with baseline code, and must not be compiled for more than that."""
    including = {name for name in HEADERS if re.search(r"#include <", (PATHS / name).read_text("utf-8"))}
    assert including == {"target.h", "emulate.h"}
    for source in PATHS.glob("*.cpp"):
        assert re.findall(r"#include .*", source.read_text("utf-8")) == ['#include "path.h"'], source.name


def test_headers_begin_with_what_they_are_compiled_for() -> None:
    for name in sorted({*HEADERS} - {"target.h", "emulate.h"}):
        assert '#include "target.h"' in (PATHS / name).read_text("utf-8"), name
