"""Programs for a GPU without one: in Triton's interpreter (`make interpreted`), and compiled for what is not here.

A process has either the interpreter or the compiler: Triton decides when it is imported.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import triton


@pytest.fixture(autouse=True)
def _interpreted_or_not(request: pytest.FixtureRequest) -> Iterator[None]:
    is_wanted = request.node.get_closest_marker("interpreted") is not None
    assert bool(triton.knobs.runtime.interpret) == is_wanted, "make interpreted sets TRITON_INTERPRET, no other does"
    with np.errstate(all="ignore"):  # numbers that are not finite are computed with, as a device does
        yield
