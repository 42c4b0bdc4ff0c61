"""Settings on a folder of the test's own."""

from pathlib import Path

import pytest

from manylora.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", max_adapter_size=4 * 2**20)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
