"""A real catalog and gate behind the real routes, over an engine that has no model but real effects."""

import io
import tarfile
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from fastapi import FastAPI

from manylora.catalog.service import Catalog
from manylora.engine.interface import AdapterRef, Effect, Tier
from manylora.errors import Conflict, EngineDead
from manylora.identity import CONFIG_FILE, TENSOR_FILE
from manylora.lifecycle.weights.served import Inspector
from manylora.lora.format.spec import Adapter
from manylora.metrics import Metrics
from manylora.serving.parts import Foundation, open_parts
from manylora.settings import Settings
from manylora.tenants.gate import TenantGate
from manylora.tenants.interface import Role
from manylora.tenants.keys import KeyStore
from tests.api.fakes import FakeEngine
from tests.lora.malformed import Tensors, config, tensors, tiny_modules, write

MODULES = tiny_modules()


@dataclass
class CatalogEngine(FakeEngine):
    """Remembers what the catalog tells it. `effect` is what every adapter does; `users` hold back `forget`."""

    effect: Effect = field(default_factory=lambda: Effect(prompt_tokens=8, max_abs_logit_delta=1.5, kl=0.25))
    probed: list[tuple[AdapterRef, Adapter]] = field(default_factory=list)
    payers: list[tuple[str, float]] = field(default_factory=list)
    pinned: dict[str, AdapterRef] = field(default_factory=dict)
    forgotten: list[str] = field(default_factory=list)
    heirs: list[AdapterRef | None] = field(default_factory=list)
    users: Callable[[AdapterRef], Any] | None = None
    max_pinned: int = 100
    last_words: Callable[[], None] | None = None

    async def start(self) -> None:
        return

    @property
    def failure(self) -> EngineDead | None:
        return None

    def on_death(self, action: Callable[[], None]) -> None:
        self.last_words = action

    async def measure_effect(
        self, ref: AdapterRef, adapter: Adapter, *, tenant: str = "public", weight: float = 1.0
    ) -> Effect:
        self.probed.append((ref, adapter))
        self.payers.append((tenant, weight))
        return self.effect

    def tier_of(self, ref: AdapterRef) -> Tier:
        return "device" if ref.id in self.pinned else "disk"

    def pin(self, ref: AdapterRef) -> None:
        if len(self.pinned) >= self.max_pinned:
            raise Conflict("Every slot is pinned.")
        self.pinned[ref.id] = ref

    def unpin(self, ref: AdapterRef) -> None:
        del self.pinned[ref.id]

    async def forget(self, ref: AdapterRef, *, heir: AdapterRef | None = None) -> None:
        if self.users is not None:
            await self.users(ref)
        self.forgotten.append(ref.id)
        self.heirs.append(heir)


@dataclass
class Rig:
    """One running server, in process. `keys` has a bearer text per `tenant:role`; empty for an open server."""

    settings: Settings
    engine: CatalogEngine
    catalog: Catalog
    gate: TenantGate
    metrics: Metrics
    app: FastAPI
    client: httpx2.AsyncClient
    keys: dict[str, str] = field(default_factory=dict)

    def headers(self, who: str | None) -> dict[str, str]:
        return {} if who is None else {"authorization": f"Bearer {self.keys[who]}"}

    async def make_keys(self, *owners: str) -> None:
        """`acme:manager` and so on."""
        for owner in owners:
            tenant, _, role = owner.partition(":")
            _, self.keys[owner] = KeyStore(self.catalog.database).create(tenant, Role(role))
        await self.gate.refresh()

    async def call(self, method: str, path: str, who: str | None = None, **kwargs: Any) -> httpx2.Response:
        response: httpx2.Response = await self.client.request(method, path, headers=self.headers(who), **kwargs)
        return response

    async def push(
        self, name: str, files: Mapping[str, bytes] | None = None, who: str | None = None, **fields: str
    ) -> httpx2.Response:
        parts = [("files", (file, data)) for file, data in (sound_files() if files is None else files).items()]
        return await self.call("POST", "/v1/adapters", who, data={"name": name, **fields}, files=parts)

    async def push_archive(self, name: str, data: bytes, who: str | None = None, **fields: str) -> httpx2.Response:
        parts = [("archive", ("adapter.tar.gz", data))]
        return await self.call("POST", "/v1/adapters", who, data={"name": name, **fields}, files=parts)

    async def settle(self) -> None:
        """Wait until every deleted version is gone."""
        assert self.catalog._retirement is not None
        await self.catalog._retirement.settled()

    def stored(self) -> list[str]:
        """Every file below the data folder that holds adapter bytes, wherever."""
        data = self.settings.data_dir
        own = {"lock", "registry", "had_keys"}
        found = [p for p in data.rglob("*") if p.is_file() and p.name not in own and ".sqlite3" not in p.name]
        return sorted(str(p.relative_to(data)) for p in found if p.parent.name != "labels")

    async def assert_answers(self) -> None:
        """The server still does its work."""
        who = next(iter(self.keys), None)
        body = {"model": "base-model", "prompt": "hi", "max_tokens": 2}
        response = await self.call("POST", "/v1/completions", who, json=body)
        assert response.status_code == 200, response.text


@asynccontextmanager
async def running(settings: Settings, *keys: str, engine: CatalogEngine | None = None) -> AsyncIterator[Rig]:
    """A server on these settings until the block ends; the data folder stays, so that it can be started again."""
    engine = engine or CatalogEngine()
    foundation = Foundation(
        modules=MODULES, inspect=Inspector(settings.data_dir, MODULES), build_engine=lambda *_: engine
    )
    async with AsyncExitStack() as stack:
        parts = await stack.enter_async_context(open_parts(settings, lambda _: foundation))
        app = parts.app()
        transport = httpx2.ASGITransport(app=app, raise_app_exceptions=True)
        client = await stack.enter_async_context(httpx2.AsyncClient(transport=transport, base_url="http://localhost"))
        rig = Rig(settings, engine, parts.catalog, parts.gate, parts.metrics, app, client)
        await rig.make_keys(*keys)
        yield rig


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def write_sound(folder: Path, seed: float = 1.0, **changes: Any) -> Path:
    """A sound adapter, another one for each `seed`."""
    write(folder, scaled(tensors(), seed), config(**changes))
    return folder


def scaled(arrays: Tensors, factor: float) -> Tensors:
    return {name: (array * np.float32(factor)).astype(array.dtype) for name, array in arrays.items()}


def sound_files(seed: float = 1.0) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return files_of(write_sound(Path(folder), seed))


def tar_of(files: Mapping[str, bytes], *, prefix: str = "", mode: str = "w:gz") -> bytes:
    """Files in a tar archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


__all__ = ["CONFIG_FILE", "MODULES", "TENSOR_FILE", "CatalogEngine", "Rig", "files_of", "running", "sound_files"]
