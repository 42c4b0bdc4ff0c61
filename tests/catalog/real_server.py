"""A real server process on a tiny model, for tests that go over HTTP."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.server_process import ServerProcess

START_S = 180.0


@dataclass
class Server:
    """A server process that is up."""

    process: ServerProcess
    client: httpx.Client
    data: Path

    def stored(self) -> set[str]:
        """Every file below its data folder but the database's."""
        return {str(p.relative_to(self.data)) for p in self.data.rglob("*") if p.is_file() and ".sqlite3" not in p.name}

    def complete(self, model: str) -> str:
        body = {"model": model, "prompt": "The quick brown fox", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
        response = self.client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["text"]
        return text

    def push(self, name: str, files: Mapping[str, bytes]) -> httpx.Response:
        parts = [("files", (file, data)) for file, data in files.items()]
        return self.client.post("/v1/adapters", data={"name": name}, files=parts)


@contextmanager
def serving(model: Path, folder: Path, **settings: Any) -> Iterator[Server]:
    """The process, killed with SIGKILL at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {
        "model": str(model), "served_name": "tiny", "port": 0, "dtype": "float32", "kv_cache_memory": "4MiB",
        "adapter_memory": "64MiB", "host_tier_memory": "64MiB", "num_threads": 1, "data_dir": str(folder / "data"),
        "max_adapter_size": "4MiB", **settings,
    }  # fmt: skip
    process = ServerProcess(wanted, folder / "log")
    try:
        announcement = process.announcement()
        assert announcement is not None, (folder / "log").read_text()
        with httpx.Client(base_url=announcement["url"], timeout=START_S) as client:
            yield Server(process, client, folder / "data")
    finally:
        process.close()
