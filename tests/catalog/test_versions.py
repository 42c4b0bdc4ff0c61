"""Versions: promote, roll back, pin, delete, and what running requests see of it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import pytest
from sqlalchemy import event

from manylora.database.tables import VersionRow
from manylora.engine.interface import AdapterRef
from manylora.errors import AdapterNotFound
from manylora.settings import Settings

from .rig import CatalogEngine, Rig, running, sound_files

pytestmark = pytest.mark.anyio


async def _push_versions(rig: Rig, name: str, count: int) -> list[str]:
    pushes = [await rig.push(name, sound_files(float(n + 1)), activate="true") for n in range(count)]
    return [pushed.json()["id"] for pushed in pushes]


async def test_promote_and_roll_back_change_what_the_name_means(settings: Settings) -> None:
    async with running(settings) as rig:
        ids = await _push_versions(rig, "x", 3)
        for number in (1, 3, 2):
            answer = await rig.call("PATCH", "/v1/adapters/x", json={"active_version": number})
            assert (answer.status_code, answer.json()["active_version"]) == (200, number)
            assert rig.catalog.directory.resolve("public", "x").id == ids[number - 1]
        assert [rig.catalog.directory.resolve("public", "x", n).id for n in (1, 2, 3)] == ids


async def _page(rig: Rig, **params: int) -> tuple[list[int], int | None]:
    answer = (await rig.call("GET", "/v1/adapters/x", params=params)).json()
    assert (answer["num_versions"], answer["newest_version"]) == (5, 5)
    assert [version["version"] for version in answer["versions"] if version["active"]] in ([], [1])
    return [version["version"] for version in answer["versions"]], answer["next_before"]


async def test_a_page_of_versions_has_the_newest_and_the_active_one_and_goes_backwards(settings: Settings) -> None:
    async with running(settings) as rig:
        await _push_versions(rig, "x", 5)
        await rig.call("PATCH", "/v1/adapters/x", json={"active_version": 1})
        assert await _page(rig) == ([1, 2, 3, 4, 5], None)
        assert await _page(rig, limit=2) == ([1, 4, 5], 4)
        assert await _page(rig, limit=2, before=4) == ([2, 3], 2)
        assert await _page(rig, limit=2, before=2) == ([1], None)
        assert await _page(rig, limit=2, before=1) == ([], None)
        assert await _page(rig, limit=4) == ([1, 2, 3, 4, 5], 2)
        assert await _page(rig, limit=5) == ([1, 2, 3, 4, 5], None)
        sizes = [(await rig.call("GET", f"/v1/adapters/x/versions/{n}")).json()["size_bytes"] for n in range(1, 6)]
        shown = (await rig.call("GET", "/v1/adapters/x", params={"limit": 1})).json()
        listed = (await rig.call("GET", "/v1/adapters")).json()["data"]
        assert listed == [{key: value for key, value in shown.items() if key not in ("versions", "next_before")}]
        assert shown["size_bytes"] == sum(sizes)
        for limit in (0, 1001):
            assert (await rig.call("GET", "/v1/adapters/x", params={"limit": limit})).status_code == 400


async def test_an_adapter_is_shown_without_reading_all_its_versions(settings: Settings) -> None:
    async with running(settings) as rig:
        await _push_versions(rig, "x", 5)
        with count_rows(VersionRow) as seen:
            await rig.call("GET", "/v1/adapters/x", params={"limit": 1})
            assert len(seen) <= 3, "the page, one to see whether there are more, and the active one"
            seen.clear()
            await rig.call("GET", "/v1/adapters/x/versions/2")
            await rig.call("GET", "/v1/adapters")
            assert len(seen) <= 3, "the version that was asked for, and the active one twice"


@contextmanager
def count_rows(kind: type[VersionRow]) -> Iterator[list[str]]:
    """Ids of the rows that are loaded whole from the database during the block, each time they are."""
    seen: list[str] = []

    def note(row: VersionRow, _context: object) -> None:
        seen.append(row.id)

    event.listen(kind, "load", note)
    try:
        yield seen
    finally:
        event.remove(kind, "load", note)


async def test_promoting_a_version_that_is_not_there_changes_nothing(settings: Settings) -> None:
    async with running(settings) as rig:
        await rig.push("x")
        answer = await rig.call("PATCH", "/v1/adapters/x", json={"active_version": 2, "description": "new"})
        assert answer.status_code == 404
        shown = (await rig.call("GET", "/v1/adapters/x")).json()
        assert (shown["active_version"], shown["description"]) == (1, "")


async def test_openais_way_to_delete(settings: Settings) -> None:
    async with running(settings, "acme:user", "acme:manager", "rival:manager") as rig:

        async def delete(name: str, who: str = "acme:manager") -> httpx2.Response:
            return await rig.call("DELETE", f"/v1/models/{name}", who)

        for seed in (1.0, 2.0):
            await rig.push("x", sound_files(seed), "acme:manager", activate="true")
        assert [(await delete("x", who)).status_code for who in ("acme:user", "rival:manager")] == [403, 404]
        assert (await delete("x@1")).json() == {"id": "x@1", "object": "model", "deleted": True}
        assert (await delete("x@1")).status_code == 404
        assert (await delete("base-model:x")).json()["deleted"]
        assert (await rig.call("GET", "/v1/models/x", "acme:user")).status_code == 404
        assert [(await delete(name)).status_code for name in ("base-model", "owner/x", "gone")] == [403, 404, 404]


async def test_a_pin_follows_the_active_version(settings: Settings) -> None:
    async with running(settings) as rig:
        ids = await _push_versions(rig, "x", 2)
        await rig.call("PATCH", "/v1/adapters/x", json={"pinned": True})
        assert list(rig.engine.pinned) == [ids[1]]
        versions = (await rig.call("GET", "/v1/adapters/x")).json()["versions"]
        assert [(v["pinned"], v["tier"]) for v in versions] == [(False, "disk"), (True, "device")]
        await rig.call("PATCH", "/v1/adapters/x", json={"active_version": 1})
        assert list(rig.engine.pinned) == [ids[0]]
        await rig.call("PATCH", "/v1/adapters/x", json={"pinned": False})
        assert rig.engine.pinned == {}


async def test_an_adapter_that_the_engine_cannot_pin_is_not_called_pinned(settings: Settings) -> None:
    async with running(settings, engine=CatalogEngine(max_pinned=0)) as rig:
        await rig.push("x")
        answer = await rig.call("PATCH", "/v1/adapters/x", json={"pinned": True})
        assert answer.status_code == 409
        assert (await rig.call("GET", "/v1/adapters/x")).json()["pinned"] is False
        uploaded = await rig.push("y", pinned="true")
        assert (uploaded.status_code, uploaded.json()["pinned"]) == (201, False)


async def test_deleted_adapter_keeps_its_files_until_its_requests_have_finished(settings: Settings) -> None:
    finished = asyncio.Event()

    async def wait(_ref: AdapterRef) -> None:
        await finished.wait()

    async with running(settings) as rig:
        await rig.push("x", pinned="true")
        ref = rig.catalog.directory.resolve("public", "x")
        rig.engine.users = wait
        assert (await rig.call("DELETE", "/v1/adapters/x")).status_code == 204
        with pytest.raises(AdapterNotFound):
            rig.catalog.directory.resolve("public", "x")
        assert (await rig.call("GET", "/v1/adapters/x")).status_code == 404
        assert rig.engine.pinned == {}
        assert rig.catalog.local_folder(ref).is_dir(), "a running request may still have to load it again"
        finished.set()
        await rig.settle()
        assert rig.engine.forgotten[-1] == ref.id
        assert rig.stored() == []
        rig.catalog.check_integrity()


async def test_files_shared_by_two_names_go_with_the_last_one(settings: Settings) -> None:
    async with running(settings) as rig:
        await rig.push("a")
        await rig.push("b")
        await rig.call("DELETE", "/v1/adapters/a")
        await rig.settle()
        assert len(rig.stored()) == 2
        assert rig.catalog.local_folder(rig.catalog.directory.resolve("public", "b")).is_dir()
        await rig.call("DELETE", "/v1/adapters/b")
        await rig.settle()
        assert rig.stored() == []


async def test_a_name_uploaded_again_while_its_old_version_retires_keeps_its_files(settings: Settings) -> None:
    finished = asyncio.Event()

    async def wait(_ref: AdapterRef) -> None:
        await finished.wait()

    async with running(settings) as rig:
        first = (await rig.push("x")).json()
        rig.engine.users = wait
        await rig.call("DELETE", "/v1/adapters/x")
        rig.engine.users = None
        again = (await rig.push("x")).json()
        finished.set()
        await rig.settle()
        assert again["id"] != first["id"]
        assert len(rig.stored()) == 2
        rig.catalog.check_integrity()


async def test_version_numbers_are_never_used_again(settings: Settings) -> None:
    async with running(settings) as rig:
        await _push_versions(rig, "x", 2)
        assert (await rig.call("DELETE", "/v1/adapters/x/versions/1")).status_code == 204
        assert (await rig.push("x", sound_files(9.0))).json()["version"] == 3
        await rig.call("DELETE", "/v1/adapters/x")
        assert (await rig.push("x", sound_files(1.0))).json()["version"] == 4
    async with running(settings) as rig:
        assert (await rig.push("x", sound_files(2.0))).json()["version"] == 5


async def test_the_active_version_of_several_cannot_be_deleted(settings: Settings) -> None:
    async with running(settings) as rig:
        await _push_versions(rig, "x", 2)
        answer = await rig.call("DELETE", "/v1/adapters/x/versions/2")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")
        assert (await rig.call("DELETE", "/v1/adapters/x/versions/1")).status_code == 204
        assert (await rig.call("DELETE", "/v1/adapters/x/versions/2")).status_code == 204
        assert (await rig.call("GET", "/v1/adapters/x")).status_code == 404


async def test_a_request_keeps_the_version_it_began_with(settings: Settings) -> None:
    async with running(settings, engine=CatalogEngine(step_s=0.02)) as rig:
        await _push_versions(rig, "x", 1)
        body = {"model": "x", "prompt": "hi", "max_tokens": 16}
        slow = asyncio.create_task(rig.call("POST", "/v1/completions", json=body))
        while not rig.engine.generations:
            await asyncio.sleep(0)
        await rig.push("x", sound_files(2.0), activate="true")
        later = await rig.call("POST", "/v1/completions", json=body)
        assert (await slow).headers["x-manylora-adapter"] == "x@1"
        assert later.headers["x-manylora-adapter"] == "x@2"


async def test_pages_go_through_every_adapter_newest_first(settings: Settings) -> None:
    async with running(settings) as rig:
        names = [f"n{i}" for i in range(7)]
        for i, name in enumerate(names):
            await rig.push(name, sound_files(float(i + 1)))
        seen: list[str] = []
        after = ""
        while True:
            page = (await rig.call("GET", f"/v1/adapters?limit=3{after}")).json()
            seen += [item["name"] for item in page["data"]]
            if not page["has_more"]:
                break
            after = f"&after={page['last_id']}"
            await rig.push(f"late{len(seen)}", sound_files(1.0))  # what comes later does not shift the pages
        assert seen == names[::-1]


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "after=nobody"])
async def test_a_bad_page_is_an_invalid_request(settings: Settings, query: str) -> None:
    async with running(settings) as rig:
        answer = await rig.call("GET", f"/v1/adapters?{query}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, query.partition("=")[0])


@pytest.mark.parametrize(
    "body", [{}, {"active_version": 0}, {"active_version": "1"}, {"active_version": True}, {"pinned": 1}, {"name": "y"},
             {"active_version": 2**40}, {"description": "x" * 5000}, {"pinned": None}]
)  # fmt: skip
async def test_a_bad_change_is_an_invalid_request(settings: Settings, body: dict[str, object]) -> None:
    async with running(settings) as rig:
        await rig.push("x")
        assert (await rig.call("PATCH", "/v1/adapters/x", json=body)).status_code == 400


async def test_many_uploads_of_one_name_at_once_number_without_gaps(settings: Settings) -> None:
    async with running(settings) as rig:
        done = await asyncio.gather(*(rig.push("x", sound_files(float(n + 1))) for n in range(8)))
        assert sorted(response.json()["version"] for response in done) == list(range(1, 9))
        rig.catalog.check_integrity()


async def test_one_content_uploaded_twice_at_once_is_one_version(settings: Settings) -> None:
    async with running(settings) as rig:
        done = await asyncio.gather(*(rig.push("x") for _ in range(6)))
        assert {response.json()["version"] for response in done} == {1}
        assert sorted(response.status_code for response in done) == [200] * 5 + [201]
        assert len(rig.stored()) == 2
