"""A server for the pages whose commands are typed in."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.default_server import default_server

PATIENCE_S = 300


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, default_model_dir: Path) -> Iterator[str]:
    """The address of a real server on the default model and the shipped adapters."""
    with default_server(tmp_path_factory.mktemp("served"), PATIENCE_S) as address:
        yield address
