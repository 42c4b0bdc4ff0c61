"""The page in a real browser, before a real server process with a tiny model."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from manylora.database.database import open_database
from manylora.tenants.interface import Role
from manylora.tenants.keys import KeyStore
from tests.e2e.conftest import Server, running
from tests.tiny_adapters import make_adapter

from .chromium import PATIENCE_S, Visit, launch, visiting

expect.set_options(timeout=PATIENCE_S * 1000)
NAMES = ("legal-contracts", "support-de", "sql")
OpenPage: TypeAlias = Callable[..., Visit]


@pytest.fixture(scope="package")
def folders(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters that the server knows, and `spare` and `other`, which it does not."""
    root, spare = tmp_path_factory.mktemp("known"), tmp_path_factory.mktemp("spare")
    made = {n: make_adapter(tiny_llama_dir, root / n, rank=4, seed=i, strength=2.0) for i, n in enumerate(NAMES)}
    made["spare"] = make_adapter(tiny_llama_dir, spare / "Sales Notes", rank=8, seed=10, strength=2.0)
    made["other"] = make_adapter(tiny_llama_dir, spare / "other", rank=8, seed=11, strength=2.0)
    return made


@pytest.fixture(scope="package")
def settings(tiny_llama_dir: Path, folders: dict[str, Path]) -> dict[str, Any]:
    return {
        "model": str(tiny_llama_dir),
        "served_name": "tiny",
        "adapters": str(folders["sql"].parent),
        "port": 0,
        "dtype": "float32",
        "kv_cache_memory": "8MiB",
        "adapter_memory": "64MiB",
        "host_tier_memory": "64MiB",
        "max_slots": 12,
        "num_threads": 1,
    }


@pytest.fixture(scope="package")
def server(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An open server."""
    folder = tmp_path_factory.mktemp("open-server")
    with running(settings | {"data_dir": str(folder / "data")}, folder / "log") as server:
        yield server


@pytest.fixture(scope="package")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A key of each role for the tenant `acme`, and `folder`, the data directory that knows them."""
    data = tmp_path_factory.mktemp("keyed-server") / "data"
    data.mkdir()
    database = open_database(f"sqlite:///{data / 'registry.sqlite3'}")
    store = KeyStore(database)
    made = {role.value: store.create("acme", role)[1] for role in Role}
    database.close()
    return {**made, "folder": str(data)}


@pytest.fixture(scope="package")
def keyed_server(settings: dict[str, Any], keys: dict[str, str]) -> Iterator[Server]:
    """A server that asks for a key; `acme` has one adapter of its own, `acme-notes`."""
    data = Path(keys["folder"])
    with running(settings | {"data_dir": str(data)}, data.parent / "log") as server:
        upload(server.url, Path(settings["adapters"]) / "sql", "acme-notes", key=keys["manager"])
        yield server


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, server: Server) -> Iterator[OpenPage]:
    """`open_page(tab=…)` shows the dashboard of the open server, `of` of another; all is checked at the end."""
    with ExitStack() as stack:
        visits: list[Visit] = []

        def open_one(
            of: Server | None = None, expected: set[int] | None = None, tab: str = "", **options: Any
        ) -> Visit:
            visit = stack.enter_context(visiting(browser, (of or server).url, **options))
            visit.expected = expected or set()
            visits.append(visit)
            return visit.open(tab)

        yield open_one
        for visit in visits:
            visit.check()


@pytest.fixture
def own_server(settings: dict[str, Any], tmp_path: Path) -> Iterator[Server]:
    """A server of the test's own, which it may end."""
    with running(settings | {"data_dir": str(tmp_path / "data")}, tmp_path / "log") as server:
        yield server


def upload(url: str, folder: Path, name: str, *, key: str | None = None, **fields: str) -> dict[str, Any]:
    """Upload through the API; gives the version."""
    files = [("files", (n, (folder / n).read_bytes())) for n in ("adapter_config.json", "adapter_model.safetensors")]
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    answer = httpx.post(f"{url}/v1/adapters", data={"name": name, **fields}, files=files, headers=headers, timeout=60)
    assert answer.status_code in (200, 201), answer.text
    version: dict[str, Any] = answer.json()
    return version


def complete(url: str, model: str, prompt: str, max_tokens: int = 24) -> str:
    """The greedy completion by the API."""
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    text: str = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    return text
