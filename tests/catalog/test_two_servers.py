"""Two servers on one PostgreSQL and one S3: what one does, the other knows, and nobody is told otherwise."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import func, select, text, update

from manylora.api.auth import REVISION_HEADER
from manylora.catalog.registry import Registry
from manylora.database.tables import ReplicaRow
from manylora.settings import Settings
from manylora.tenants.interface import Role
from manylora.tenants.keys import KeyStore

from . import postgres
from .rig import Rig, running, sound_files

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
PATIENCE_S = 60.0
_seeds = count(1)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def bucket(s3_server: str) -> Iterator[str]:
    import s3fs

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", s3_server)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        name = f"bucket-{os.urandom(4).hex()}"
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)
        yield f"s3://{name}"
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
async def pair(
    cluster: postgres.Cluster, bucket: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Rig, Rig]]:
    url = cluster.new_database()
    folders = (tmp_path_factory.mktemp(name) for name in "ab")
    async with AsyncExitStack() as stack:
        a, b = [await stack.enter_async_context(running(settings_in(folder, url, bucket))) for folder in folders]
        await a.make_keys("acme:manager", "ops:admin")
        b.keys = a.keys
        await until(lambda: not b.gate.is_open)
        yield a, b


def settings_in(folder: Path, url: str, bucket: str) -> Settings:
    return Settings(data_dir=folder, database_url=url, store_url=f"{bucket}/store", max_adapter_size=2**22)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not is_so():
            await asyncio.sleep(0.005)


def some_files() -> dict[str, bytes]:
    return sound_files(float(next(_seeds)))


def token(answer: httpx2.Response) -> dict[str, str]:
    return {REVISION_HEADER: answer.headers[REVISION_HEADER]}


async def ask(rig: Rig, model: str, more: dict[str, str] | None = None) -> httpx2.Response:
    """A completion by `acme`."""
    body = {"model": model, "prompt": "hi", "max_tokens": 2}
    headers = rig.headers("acme:manager") | (more or {})
    answer: httpx2.Response = await rig.client.post("/v1/completions", json=body, headers=headers)
    return answer


async def test_what_was_uploaded_here_answers_there(pair: tuple[Rig, Rig]) -> None:
    a, b = pair
    for number in (1, 2):
        assert (await a.push("new", some_files(), "acme:manager", activate="false")).status_code == 201
        assert (await ask(b, f"new@{number}")).status_code == 200
        assert (await b.call("GET", f"/v1/adapters/new/versions/{number}", "acme:manager")).status_code == 200
    assert (await b.push("other", some_files(), "acme:manager")).status_code == 201
    for path in ("/v1/adapters/other", "/v1/models/other", "/v1/models/acme/other"):
        assert (await a.call("GET", path, "acme:manager")).status_code == 200
    assert (await ask(a, "acme/other")).headers["x-manylora-adapter"] == "other@1"
    assert (await a.call("DELETE", "/v1/adapters/other", "acme:manager")).status_code == 204


async def test_who_changed_something_finds_it_changed_wherever_he_asks(pair: tuple[Rig, Rig]) -> None:
    a, b = pair
    for _ in range(2):
        await a.push("turned", some_files(), "acme:manager")
    for here, there in ((a, b), (b, a)):
        for number in (1, 2):
            path, body = "/v1/adapters/turned", {"active_version": number}
            done = await here.call("PATCH", path, "acme:manager", json=body)
            answer = await ask(there, "turned", token(done))
            assert answer.headers["x-manylora-adapter"] == f"turned@{number}"
    done = await a.call("DELETE", "/v1/adapters/turned", "acme:manager")
    answer = await ask(b, "turned", token(done))
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "adapter_not_found")


async def test_a_token_of_another_database_asks_for_nothing_and_no_number_is_no_token(pair: tuple[Rig, Rig]) -> None:
    a, b = pair
    await a.push("there", some_files(), "acme:manager")
    assert (await ask(b, "there", {REVISION_HEADER: "9" * 18})).status_code == 200
    for nothing in ("-1", "x", "", "9" * 19):
        refused = await ask(b, "there", {REVISION_HEADER: nothing})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_request")


async def test_changes_are_heard_of_before_anybody_asks(pair: tuple[Rig, Rig]) -> None:
    a, b = pair
    await a.push("told", some_files(), "acme:manager", pinned="true")
    await until(lambda: "told@1" in {ref.label for ref in b.engine.pinned.values()})
    await a.call("DELETE", "/v1/adapters/told", "acme:manager")
    await until(lambda: b.catalog.directory.own("acme", "told") is None)
    key, _ = KeyStore(a.catalog.database).create("acme", Role.USER)
    await until(lambda: key.prefix in b.gate._keys)


async def test_only_what_changed_is_read(pair: tuple[Rig, Rig]) -> None:
    a, b = pair
    for name in ("one", "two", "three"):
        await a.push(name, some_files(), "acme:manager")
    other = Registry(b.catalog.database, b.catalog._base)
    assert other.refresh() is None
    await a.call("PATCH", "/v1/adapters/two", "acme:manager", json={"description": "changed"})
    await a.call("DELETE", "/v1/adapters/three", "acme:manager")
    changes = other.refresh()
    assert changes is not None
    assert changes.names == (("acme", "two"), ("acme", "three"))
    assert [ref.label for ref in changes.gone] == ["three@1"]
    other.check_integrity()


async def test_a_change_that_left_no_trace_is_found(pair: tuple[Rig, Rig]) -> None:
    a, b = pair
    for _ in range(2):
        await a.push("by-hand", some_files(), "acme:manager")
    await b.catalog.refresh()
    with a.catalog.database.write(None) as session:
        session.execute(text("UPDATE adapters SET active_version = 1 WHERE name = 'by-hand'"))
        session.execute(text("UPDATE revisions SET value = value + 1 WHERE topic = 'catalog'"))
    await a.push("after", some_files(), "acme:manager")  # leaves a trace, and of this one alone
    for rig in pair:
        await rig.catalog.refresh()
        assert rig.catalog.directory.resolve("acme", "by-hand").version == 1
        rig.catalog.check_integrity()


async def test_files_stay_until_every_server_has_let_go(pair: tuple[Rig, Rig]) -> None:
    a, b = pair
    await a.push("held", some_files(), "acme:manager")
    await ask(b, "held")
    ref = b.catalog.directory.resolve("acme", "held")
    blob = b.catalog.directory.blob_of(ref.id)
    assert blob is not None
    over = asyncio.Event()
    b.engine.users = lambda _: over.wait()
    try:
        await a.call("DELETE", "/v1/adapters/held", "acme:manager")
        await until(lambda: ref.id in a.engine.forgotten)
        await a.settle()
        await b.catalog.refresh()
        assert (await ask(b, "held")).status_code == 404
        assert (await asyncio.to_thread(b.catalog.local_folder, ref)).is_dir()  # a request that waits for its turn
        assert a.catalog.store.has(blob)
    finally:
        over.set()
        b.engine.users = None
    await b.settle()
    assert not a.catalog.store.has(blob)


async def test_a_server_that_is_gone_holds_back_nothing(
    pair: tuple[Rig, Rig], bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair
    await a.push("left", some_files(), "acme:manager")
    await b.catalog.refresh()
    blob = a.catalog.directory.blob_of(a.catalog.directory.resolve("acme", "left").id)
    assert blob is not None
    async with running(settings_in(tmp_path, a.settings.resolved_database_url, bucket)) as third:
        third.engine.users = lambda _: asyncio.Event().wait()
        await a.call("DELETE", "/v1/adapters/left", "acme:manager")
        await third.catalog.refresh()
        for rig in pair:
            await rig.catalog.refresh()
            await rig.settle()
        assert a.catalog.store.has(blob)
        monkeypatch.setattr(third.catalog.replicas, "leave", lambda: None)  # it is killed
    with a.catalog.database.write(None) as session:
        least = select(func.min(ReplicaRow.let_go)).scalar_subquery()
        aged = update(ReplicaRow).where(ReplicaRow.let_go == least)
        session.execute(aged.values(last_seen=ReplicaRow.last_seen - 60_000_000))
    await a.catalog._freeing.free()
    assert not a.catalog.store.has(blob)


async def test_a_pinned_adapter_is_pinned_on_as_many_servers_as_are_to_pin_it(
    pair: tuple[Rig, Rig], bucket: str, tmp_path: Path
) -> None:
    a, _ = pair
    for number in range(8):
        await a.push(f"pinned-{number}", some_files(), "acme:manager", pinned="true")
    url = a.settings.resolved_database_url
    one = [settings_in(tmp_path / name, url, bucket).model_copy(update={"pin_replicas": 1}) for name in "cd"]
    async with running(one[0]) as c:
        async with running(one[1]) as d:
            servers = (*pair, c, d)
            for rig in servers:
                await rig.catalog._freeing.free()  # each knows of all
            live = {rig.catalog.replicas.live for rig in servers}
            assert live == {frozenset(rig.catalog.replicas.id for rig in servers)}
            keys = {f"pinned-{number}@1" for number in range(8)}
            for ref in a.engine.pinned.values():  # without the setting, all
                keys.discard(ref.label)
                holders = [rig for rig in servers if rig.catalog.replicas.is_among(1, ref.id)]
                assert len(holders) == 1
                for rig in (c, d):
                    assert (ref.id in rig.engine.pinned) == (rig in holders)
            assert not keys
        await c.catalog._freeing.free()
        mine = {ref.id for ref in a.engine.pinned.values() if c.catalog.replicas.is_among(1, ref.id)}
        assert c.engine.pinned.keys() == mine  # its share of what the other one had, too
    for number in range(8):
        await a.call("DELETE", f"/v1/adapters/pinned-{number}", "acme:manager")


async def test_guessed_names_cost_few_looks(pair: tuple[Rig, Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    _, b = pair
    looks = 0

    async def look() -> None:
        nonlocal looks
        looks += 1

    monkeypatch.setattr(b.catalog.following, "_refresh", look)
    began = time.monotonic()
    answers: list[Any] = await asyncio.gather(*(ask(b, f"guess-{number}") for number in range(40)))
    assert {answer.status_code for answer in answers} == {404}
    most = 3 + (time.monotonic() - began) / 0.1
    assert 1 <= looks <= most


async def test_a_user_has_one_version_of_a_canary_on_both_and_both_count_it(pair: tuple[Rig, Rig]) -> None:
    a, b = pair
    for _ in range(2):
        await a.push("tried", some_files(), "acme:manager")
    body = {"version": 2, "share": 0.5}
    begun = await a.call("PUT", "/v1/adapters/tried/canary", "acme:manager", json=body)
    assert begun.status_code == 200, begun.text

    async def heard(rig: Rig, user: str) -> str:
        asked = {"model": "tried", "prompt": "hi", "max_tokens": 2, "user": user}
        headers = rig.headers("acme:manager") | token(begun)
        return str(
            (await rig.client.post("/v1/completions", json=asked, headers=headers)).headers["x-manylora-adapter"]
        )

    users = [f"u{n}" for n in range(60)]
    here, there = [[await heard(rig, user) for user in users] for rig in (a, b)]
    assert here == there
    assert set(here) == {"tried@1", "tried@2"}
    for rig in (a, b):
        found = (await rig.call("GET", "/v1/adapters/tried/canary", "acme:manager")).json()
        counts = {f"tried@{arm['version']}": arm["requests"] for arm in found["versions"]}
        assert counts == {label: 2 * here.count(label) for label in set(here)}
    ended = await b.call("PATCH", "/v1/adapters/tried", "acme:manager", json={"active_version": 2})
    assert (await ask(a, "tried", token(ended))).headers["x-manylora-adapter"] == "tried@2"
    assert (await a.call("GET", "/v1/adapters/tried/canary", "acme:manager")).json()["reason"] == "promoted"
