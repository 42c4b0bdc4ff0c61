"""Builds the optional C++ kernels; everything else about the package is in pyproject.toml."""

import os
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))

SOURCES = sorted(str(path) for path in Path("server/manylora/csrc").rglob("*.cpp"))

# For tests (make sanitize): what the kernels read and write is watched, and undefined arithmetic ends the process.
IS_SANITIZED = bool(os.environ.get("MANYLORA_SANITIZE"))
# For tests (make emulated): the CPU paths that this machine lacks, by emulation (csrc/paths/emulate.h).
IS_EMULATED = bool(os.environ.get("MANYLORA_EMULATE"))
# What is built for tests need not be fast: it compiles in a fifth of the time.
OPTIMIZATION = "-O1" if IS_SANITIZED or IS_EMULATED else "-O3"
# What the first of them sees as well is left out of the second: the kernels compile in 0.6 of the time.
SANITIZERS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize=null,alignment,vptr,object-size,pointer-overflow",
    "-fno-sanitize-recover=undefined",
]

# Without a compiler the installation succeeds and the server runs on torch alone, which it says in its log.
kernels = CppExtension(
    "manylora._C",
    SOURCES,
    extra_compile_args=[
        OPTIMIZATION,
        *(["-g1", "-fno-omit-frame-pointer"] if IS_SANITIZED else ["-g0"]),
        *(SANITIZERS if IS_SANITIZED else []),
        "-std=c++20",
        "-fopenmp",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wall",
        "-Wno-psabi",
        "-Wno-maybe-uninitialized",  # GCC 12 warns of its own intrinsics
        f"-DML_EMULATE={int(IS_EMULATED)}",
    ],
    extra_link_args=SANITIZERS if IS_SANITIZED else [],
    optional=True,
)

setup(ext_modules=[kernels], cmdclass={"build_ext": BuildExtension})
