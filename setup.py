"""Builds the optional C++ kernels; everything else about the package is in pyproject.toml."""

import os
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))

SOURCES = sorted(str(path) for path in Path("server/manylora/csrc").rglob("*.cpp"))

# For tests (make sanitize): what the kernels read and write is watched, undefined arithmetic ends the process, and the
# CPU paths that this machine lacks run by emulation (csrc/paths/emulate.h).
IS_SANITIZED = bool(os.environ.get("MANYLORA_SANITIZE"))
# What is built for tests need not be fast: it compiles in a fifth of the time.
OPTIMIZATION = "-O1" if IS_SANITIZED else "-O3"
# The paths by their numbers in csrc/paths/target.h, with the flags by which Linux names what each needs beside AVX2's.
AVX2 = {"avx2", "fma", "f16c"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}
PATHS = {1: AVX2, 2: AVX2 | {"avx_vnni"}, 3: AVX512, 4: AVX512 | {"avx512_bf16"}}


def emulated_paths() -> int:
    """A bit for each path whose instructions this machine lacks, which AVX2 can stand in for."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text(encoding="utf-8").splitlines() if cpus.exists() else []
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    if not AVX2.issubset(flags):
        return 0
    return sum(1 << number for number, needed in PATHS.items() if not needed.issubset(flags))


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
        f"-DML_EMULATED={emulated_paths() if IS_SANITIZED else 0}",
    ],
    extra_link_args=SANITIZERS if IS_SANITIZED else [],
    optional=True,
)

setup(ext_modules=[kernels], cmdclass={"build_ext": BuildExtension})
