"""Builds the optional C++ kernels; everything else about the package is in pyproject.toml."""

import os
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))

SOURCES = sorted(str(path) for path in Path("server/manylora/csrc").glob("*.cpp"))

# Without a compiler the installation succeeds and the server runs on torch alone, which it says in its log.
kernels = CppExtension(
    "manylora._C",
    SOURCES,
    extra_compile_args=[
        "-O3",
        "-g0",
        "-std=c++20",
        "-fopenmp",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wall",
        "-Wno-psabi",
        "-Wno-maybe-uninitialized",  # GCC 12 warns of its own intrinsics
        # For tests: the CPU paths that this machine lacks, by emulation (csrc/emulate.h).
        f"-DML_EMULATE={int(bool(os.environ.get('MANYLORA_EMULATE')))}",
    ],
    optional=True,
)

setup(ext_modules=[kernels], cmdclass={"build_ext": BuildExtension})
