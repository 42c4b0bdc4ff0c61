"""Builds the optional C++ kernels; everything else about the package is in pyproject.toml."""

import os
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))

SOURCES = sorted(str(path) for path in Path("server/manylora/csrc").rglob("*.cpp"))

# For tests (make sanitize): what the kernels read and write is watched, and undefined arithmetic ends the process.
IS_SANITIZED = bool(os.environ.get("MANYLORA_SANITIZE"))
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
        *(["-O1", "-g1", "-fno-omit-frame-pointer"] if IS_SANITIZED else ["-O3", "-g0"]),
        *(SANITIZERS if IS_SANITIZED else []),
        "-std=c++20",
        "-fopenmp",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wall",
        "-Wno-psabi",
        "-Wno-maybe-uninitialized",  # GCC 12 warns of its own intrinsics
        # For tests: the CPU paths that this machine lacks, by emulation (csrc/paths/emulate.h).
        f"-DML_EMULATE={int(bool(os.environ.get('MANYLORA_EMULATE')))}",
    ],
    extra_link_args=SANITIZERS if IS_SANITIZED else [],
    optional=True,
)

setup(ext_modules=[kernels], cmdclass={"build_ext": BuildExtension})
