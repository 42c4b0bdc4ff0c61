"""A real server process on a tiny model with three adapters."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.server_process import ServerProcess
from tests.tiny_adapters import make_adapter

ROOT = Path(__file__).parent.parent.parent
ADAPTERS = {"small": 4, "middle": 8, "large": 64}  # name: rank


@dataclass
class Server:
    """A running process and how to talk to it."""

    process: ServerProcess
    url: str
    announcement: dict[str, Any]
    stderr: Path

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = httpx.get(f"{self.url}/v1/stats").json()
        return stats

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=120)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=120)


@contextmanager
def running(settings: dict[str, Any], stderr: Path) -> Iterator[Server]:
    process = ServerProcess(settings, stderr)
    try:
        announcement = process.announcement()
        assert announcement is not None, stderr.read_text()
        yield Server(process, announcement["url"], announcement, stderr)
    finally:
        process.close()


@pytest.fixture(scope="session")
def adapters_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, rank) in enumerate(ADAPTERS.items()):
        make_adapter(tiny_llama_dir, root / name, rank=rank, seed=seed, strength=2.0)
    return root


@pytest.fixture(scope="session")
def settings(tiny_llama_dir: Path, adapters_dir: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_llama_dir),
        "served_name": "tiny",
        "adapters": str(adapters_dir),
        "port": 0,
        "dtype": "float32",
        "kv_cache_memory": "4MiB",
        "adapter_memory": "64MiB",
        "host_tier_memory": "64MiB",
        "num_threads": 1,
    }


@pytest.fixture(scope="session")
def server(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Shared by tests that leave it as they found it."""
    folder = tmp_path_factory.mktemp("server")
    with running(settings | {"data_dir": str(folder / "data")}, folder / "log") as server:
        yield server


@pytest.fixture
def own_server(settings: dict[str, Any], tmp_path: Path) -> Callable[..., Any]:
    """`own_server(**changes)` is a context manager around a process of the test's own."""

    def run(**changes: Any) -> Any:
        return running({**settings, "data_dir": str(tmp_path / "data"), **changes}, tmp_path / "log")

    return run


@pytest.fixture
def failing_start(settings: dict[str, Any], tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """`failing_start(**changes)`: exit status and standard error of a server that cannot start."""

    def run(**changes: Any) -> tuple[int, str]:
        process = ServerProcess({**settings, "data_dir": str(tmp_path / "data"), **changes}, tmp_path / "log")
        return process.wait(120), (tmp_path / "log").read_text()

    return run


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
