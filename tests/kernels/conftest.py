"""Every test here runs once per CPU path that this machine has, and once per dtype where it takes one.

Under `make sanitize` it has all of them, those that it lacks by emulation.
"""

from collections.abc import Iterator

import pytest
import torch

from manylora.kernels import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=native.available_cpu_paths())
def cpu_path(request: pytest.FixtureRequest) -> Iterator[str]:
    path = str(request.param)
    native.set_cpu_path(path)
    yield path
    native.set_cpu_path("auto")


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    assert isinstance(request.param, torch.dtype)
    return request.param
