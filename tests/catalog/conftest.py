"""Settings on a folder of the test's own, and a tiny base for real servers."""

from pathlib import Path

import pytest

from manylora.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", max_adapter_size=4 * 2**20)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base for which `tests.lora.malformed` makes its adapters, with the vocabulary that a tokenizer needs."""
    from tests.lora.malformed import TINY_LLAMA
    from tests.tiny_models import VOCAB_SIZE, make_tiny_model

    return make_tiny_model("llama", tmp_path_factory.mktemp("base"), **{**TINY_LLAMA, "vocab_size": VOCAB_SIZE})
