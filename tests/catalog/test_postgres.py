"""The registry, the keys and the quotas in PostgreSQL, with one server on it and with two."""

import asyncio
from pathlib import Path

import pytest

from manylora.errors import AdapterNotFound, QuotaExceeded
from manylora.settings import Settings
from manylora.tenants.limits import TenantLimits, TenantStore

from . import postgres
from .rig import files_of, running, sound_files

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


@pytest.fixture
def settings(cluster: postgres.Cluster, tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", database_url=cluster.new_database(), max_adapter_size=4 * 2**20)


async def test_everything_is_there_after_a_restart(settings: Settings) -> None:
    async with running(settings) as rig:
        await rig.push("x", pinned="true", description="first")
        await rig.push("x", sound_files(2.0), activate="false")
        await rig.push("y")
        await rig.call("DELETE", "/v1/adapters/y")
        before = (await rig.call("GET", "/v1/adapters/x")).json()
    async with running(settings) as rig:
        assert (await rig.call("GET", "/v1/adapters/x")).json() == before
        assert (await rig.call("GET", "/v1/adapters/y")).status_code == 404
        assert [ref.label for ref in rig.engine.pinned.values()] == ["x@1"]
        assert (await rig.push("y", sound_files(3.0))).json()["version"] == 2
        rig.catalog.check_integrity()


async def test_promote_roll_back_and_delete(settings: Settings) -> None:
    async with running(settings) as rig:
        for seed in (1.0, 2.0):
            await rig.push("x", sound_files(seed), activate="true")
        assert (await rig.call("PATCH", "/v1/adapters/x", json={"active_version": 1})).status_code == 200
        assert rig.catalog.directory.resolve("public", "x").version == 1
        assert (await rig.call("DELETE", "/v1/adapters/x/versions/1")).status_code == 409
        assert (await rig.call("DELETE", "/v1/adapters/x/versions/2")).status_code == 204
        await rig.settle()
        assert len(rig.stored()) == 2
        rig.catalog.check_integrity()


async def test_many_uploads_at_once_number_without_gaps(settings: Settings) -> None:
    async with running(settings) as rig:
        done = await asyncio.gather(*(rig.push("x", sound_files(float(n + 1))) for n in range(8)))
        assert sorted(response.json()["version"] for response in done) == list(range(1, 9))
        rig.catalog.check_integrity()


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/adapters?after=%00", None),
        ("GET", "/v1/adapters/%00", None),
        ("GET", "/v1/adapters/x?tenant=%00", None),
        ("GET", "/v1/adapters/x%00/versions/1", None),
        ("DELETE", "/v1/adapters/%00", None),
        ("PATCH", "/v1/adapters/x", {"description": "a\0b"}),
        ("POST", "/v1/unload_lora_adapter", {"lora_name": "\0"}),
    ],
)
async def test_the_one_character_that_it_cannot_store_is_the_callers_fault(
    method: str, path: str, body: dict[str, str] | None, settings: Settings
) -> None:
    async with running(settings) as rig:
        await rig.push("x", sound_files())
        answer = await rig.call(method, path, json=body)
        assert answer.status_code in (400, 404), answer.text
        assert (await rig.call("GET", "/v1/adapters/x")).json()["description"] == ""


async def test_a_description_that_it_cannot_store_is_refused_and_nothing_is_left(settings: Settings) -> None:
    async with running(settings) as rig:
        answer = await rig.push("x", sound_files(), description="a\0b")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
        await rig.settle()
        rig.catalog.check_integrity()


async def test_pages_go_through_every_adapter_newest_first(settings: Settings) -> None:
    async with running(settings) as rig:
        for i in range(5):
            await rig.push(f"n{i}", sound_files(float(i + 1)))
        first = (await rig.call("GET", "/v1/adapters?limit=3")).json()
        rest = (await rig.call("GET", f"/v1/adapters?limit=3&after={first['last_id']}")).json()
        assert [a["name"] for a in first["data"] + rest["data"]] == ["n4", "n3", "n2", "n1", "n0"]


async def test_keys_and_quotas_hold(settings: Settings) -> None:
    async with running(settings, "acme:manager", "rival:user") as rig:
        TenantStore(rig.catalog.database).change("acme", max_adapters=1, weight=2.0)
        assert (await rig.push("x", who="acme:manager")).status_code == 201
        refused = await rig.push("y", sound_files(2.0), who="acme:manager")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, QuotaExceeded.code)
        assert (await rig.call("GET", "/v1/adapters/x", "rival:user")).status_code == 404
        assert TenantStore(rig.catalog.database).list() == {"acme": TenantLimits(weight=2.0, max_adapters=1)}


async def test_two_servers_on_one_database_see_each_others_changes(settings: Settings, tmp_path: Path) -> None:
    # fsspec's folder in memory stands for a bucket that both can reach.
    shared = settings.model_copy(update={"store_url": f"memory://{tmp_path.name}/store"})
    other = shared.model_copy(update={"data_dir": tmp_path / "other"})
    async with running(shared, "acme:manager") as a, running(other) as b:
        b.keys = a.keys
        await b.gate.refresh()
        await a.push("x", who="acme:manager", pinned="true")
        await b.catalog.refresh()
        assert [ref.label for ref in b.engine.pinned.values()] == ["x@1"]
        done = await asyncio.gather(
            *((a, b)[n % 2].push("y", sound_files(float(n + 1)), "acme:manager") for n in range(6))
        )
        assert sorted(response.json()["version"] for response in done) == list(range(1, 7))
        await b.call("DELETE", "/v1/adapters/x", "acme:manager")
        for rig in (a, b):
            await rig.catalog.refresh()
            await rig.settle()
            assert (await rig.call("GET", "/v1/adapters/x", "acme:manager")).status_code == 404
            rig.catalog.check_integrity()
        assert a.engine.pinned == b.engine.pinned == {}
        _, page = await a.catalog.versions("acme", "y", 10, None)
        assert [v.ref.version for v in page.versions] == list(range(1, 7))


async def test_what_was_deleted_on_one_server_and_is_cold_on_the_other_is_not_found(
    settings: Settings, tmp_path: Path
) -> None:
    shared = settings.model_copy(update={"store_url": f"memory://{tmp_path.name}/store"})
    other = shared.model_copy(update={"data_dir": tmp_path / "other"})
    async with running(shared) as a, running(other) as b:
        await a.push("x")
        await b.catalog.refresh()
        damaged: list[str] = []
        b.catalog._blobs.count_damaged = lambda: damaged.append("x")
        ref = b.catalog.directory.resolve("public", "x")
        over = asyncio.Event()
        b.engine.users = lambda _: over.wait()  # a request that is under way
        await a.call("DELETE", "/v1/adapters/x")
        await a.settle()
        folder = await asyncio.to_thread(b.catalog.local_folder, ref)
        assert files_of(folder).keys() == sound_files().keys()
        b.catalog._blobs._store.remove(folder.name)  # as after a time in which this server was not heard of
        with pytest.raises(AdapterNotFound):
            await asyncio.to_thread(b.catalog.local_folder, ref)
        over.set()
        assert damaged == []
        for path in ("", "/versions/1", "/versions/1/download"):
            assert (await b.call("GET", f"/v1/adapters/x{path}")).status_code == 404
        await b.catalog.refresh()
        await b.settle()
        with pytest.raises(AdapterNotFound):
            await asyncio.to_thread(b.catalog.local_folder, ref)
