"""The backup of docs/operations.md, taken from a server that runs, is a server with the same adapters and keys."""

import re
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from .conftest import ROOT, Server, running

pytestmark = pytest.mark.slow


def documented_statement(target: Path) -> str:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    found = re.search(r"VACUUM INTO '[^']*'", page)
    assert found is not None
    return found[0].replace("/data/backup.sqlite3", str(target))


def test_the_documented_backup_of_a_running_server_can_be_served(
    own_server: Callable[..., Any], settings: dict[str, Any], adapters_dir: Path, tmp_path: Path
) -> None:
    with own_server(adapters=None) as server:
        sent = upload(server, adapters_dir / "small")
        backup = tmp_path / "backup"
        backup.mkdir()
        with sqlite3.connect(tmp_path / "data" / "registry.sqlite3") as database:
            database.execute(documented_statement(backup / "registry.sqlite3"))
        database.close()
        shutil.copytree(tmp_path / "data" / "store", backup / "store")
        expected = answer(server)
    restored = {**settings, "adapters": None, "data_dir": str(backup)}
    with running(restored, tmp_path / "restored.log") as server:
        found = httpx.get(f"{server.url}/v1/adapters/mine").json()
        assert found["versions"][0]["digest"] == sent["digest"]
        assert answer(server) == expected


def upload(server: Server, folder: Path) -> dict[str, Any]:
    names = ("adapter_config.json", "adapter_model.safetensors")
    files = [("files", (name, (folder / name).read_bytes())) for name in names]
    sent = httpx.post(f"{server.url}/v1/adapters", data={"name": "mine"}, files=files, timeout=60)
    assert sent.status_code == 201, sent.text
    version: dict[str, Any] = sent.json()
    return version


def answer(server: Server) -> str:
    body = {"model": "mine", "prompt": "The quick", "temperature": 0, "max_tokens": 16}
    text: str = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    return text
