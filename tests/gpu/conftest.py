"""Programs for a GPU without one: in Triton's interpreter (`make interpreted`), and compiled for what is not here.

A process has either the interpreter or the compiler: Triton decides when it is imported.
"""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest


def pytest_pycollect_makemodule(module_path: Path) -> None:
    """Skip all of them where there is no Triton, before one of them imports it."""
    pytest.importorskip("triton", reason=f"{module_path.parent.name} needs Triton, which is for Linux")


@pytest.fixture(autouse=True)
def _interpreted_or_not(request: pytest.FixtureRequest) -> Iterator[None]:
    is_wanted = request.node.get_closest_marker("interpreted") is not None
    is_interpreted = bool(import_module("triton").knobs.runtime.interpret)
    assert is_interpreted == is_wanted, "make interpreted sets TRITON_INTERPRET, no other does"
    with np.errstate(all="ignore"):  # numbers that are not finite are computed with, as a device does
        yield
