"""One upload and the first request after it parse each of the adapter's files once."""

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from manylora.api.adapters import build_router
from manylora.catalog.local_store import LocalStore
from manylora.catalog.service import Catalog
from manylora.engine.build import EngineBuilder
from manylora.identity import ADAPTER_FILES, CONFIG_FILE, TENSOR_FILE, AdapterRef
from manylora.lora.format import config, tensors
from manylora.metrics import NoMetrics
from manylora.models.loading import load_base
from manylora.serving.app import create_app
from manylora.settings import Settings
from manylora.tenants.gate import TenantGate
from tests.tiny_adapters import make_adapter

pytestmark = pytest.mark.anyio
PROMPT = {"prompt": "The quick brown fox", "max_tokens": 6, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was parsed, and how often an adapter was read from the store."""
    found: Counter[str] = Counter()

    def counted(owner: Any, name: str, key: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            found[key] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    counted(config, "read_json", CONFIG_FILE)
    counted(tensors, "parse", TENSOR_FILE)
    counted(LocalStore, "local_folder", "store")
    return found


@asynccontextmanager
async def serving(model: Path, data: Path, **changes: Any) -> AsyncIterator[tuple[httpx2.AsyncClient, Catalog]]:
    """The whole server but its socket."""
    values = {
        "model": str(model), "served_name": "tiny", "dtype": "float32", "kv_cache_memory": 2**22,
        "adapter_memory": 2**26, "host_tier_memory": 2**26, "data_dir": data, **changes,
    }  # fmt: skip
    settings = Settings(**values)
    builder = EngineBuilder(settings, load_base(settings))
    async with AsyncExitStack() as stack:
        catalog = Catalog.open(settings, builder.modules)
        stack.push_async_callback(catalog.aclose)
        gate = TenantGate(catalog.database)
        stack.push_async_callback(gate.aclose)
        engine = builder.build(catalog, NoMetrics())
        await engine.start()
        stack.push_async_callback(engine.close)
        await catalog.attach(engine)
        routers = (build_router(catalog),)
        app = create_app(settings, engine, catalog.directory, gate, NoMetrics(), extra_routers=routers)
        transport = httpx2.ASGITransport(app=app)
        client = await stack.enter_async_context(httpx2.AsyncClient(transport=transport, base_url="http://localhost"))
        yield client, catalog


async def push(client: httpx2.AsyncClient, folder: Path) -> None:
    parts = [("files", (name, (folder / name).read_bytes())) for name in ADAPTER_FILES]
    response = await client.post("/v1/adapters", data={"name": "tuned", "activate": "true"}, files=parts)
    assert response.status_code == 201, response.text


async def complete(client: httpx2.AsyncClient, model: str) -> str:
    response = await client.post("/v1/completions", json={"model": model, **PROMPT})
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


@pytest.fixture(scope="module")
def adapter(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "tuned"
    make_adapter(tiny_llama_dir, folder, rank=8, seed=1, strength=2.0)
    return folder


async def test_an_upload_and_its_first_request_parse_each_file_once(
    tiny_llama_dir: Path, adapter: Path, tmp_path: Path, counts: Counter[str]
) -> None:
    async with serving(tiny_llama_dir, tmp_path / "data") as (client, catalog):
        await push(client, adapter)
        ref = catalog.directory.resolve("public", "tuned")
        assert catalog.tier_of(ref) == "host"
        first, base = await complete(client, "tuned"), await complete(client, "tiny")
        assert counts == {CONFIG_FILE: 1, TENSOR_FILE: 1}
        assert first != base
    async with serving(tiny_llama_dir, tmp_path / "data") as (client, _):  # from the store, with its hash
        assert await complete(client, "tuned") == first
        assert counts == {CONFIG_FILE: 2, TENSOR_FILE: 2, "store": 1}


async def test_without_room_in_host_memory_the_first_request_reads_the_store(
    tiny_llama_dir: Path, adapter: Path, tmp_path: Path, counts: Counter[str]
) -> None:
    async with serving(tiny_llama_dir, tmp_path / "data", host_tier_memory=1) as (client, _):
        await push(client, adapter)
        await complete(client, "tuned")
        assert counts == {CONFIG_FILE: 2, TENSOR_FILE: 2, "store": 1}


async def test_each_version_takes_over_its_own(
    tiny_llama_dir: Path, adapter: Path, tmp_path: Path, counts: Counter[str]
) -> None:
    other = tmp_path / "other"
    make_adapter(tiny_llama_dir, other, rank=8, seed=2, strength=2.0)
    async with serving(tiny_llama_dir, tmp_path / "data") as (client, catalog):
        await push(client, adapter)
        first = await complete(client, "tuned")
        await push(client, other)
        second: AdapterRef = catalog.directory.resolve("public", "tuned")
        assert (second.version, catalog.tier_of(second)) == (2, "host")
        assert await complete(client, "tuned@1") == first != await complete(client, "tuned")
        assert counts == {CONFIG_FILE: 2, TENSOR_FILE: 2}
