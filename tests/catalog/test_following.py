"""What a server does on its own beside requests: looking at the database, listening to it, and freeing files."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from manylora.catalog.following import Follower
from manylora.database import notices as notices_module
from manylora.database.notices import Notices
from manylora.errors import DatabaseUnavailable, StoreUnavailable
from manylora.settings import Settings

from .rig import running, sound_files

pytestmark = pytest.mark.anyio
POSTGRESQL: Any = SimpleNamespace(is_sqlite=False)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_who_waits_for_a_look_is_told_when_the_server_closes() -> None:
    is_looking = asyncio.Event()

    async def refresh() -> None:
        is_looking.set()
        await asyncio.Event().wait()

    follower = Follower(POSTGRESQL, SimpleNamespace(), refresh)  # type: ignore[arg-type]
    first = asyncio.create_task(follower.look_again())
    await is_looking.wait()
    second = asyncio.create_task(follower.look_again())
    await asyncio.sleep(0)
    await follower.aclose()
    assert [await first, await second] == [False, False]
    names = {task.get_name() for task in asyncio.all_tasks()}
    assert "catalog-look" not in names


async def test_notices_are_heard_again_after_any_fault(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notices_module, "_RETRY_S", 0.0)
    faults: Iterator[Exception] = iter([RuntimeError("odd"), ConnectionError("away")])

    @asynccontextmanager
    async def listening(channels: Sequence[str]) -> AsyncIterator[AsyncIterator[str]]:
        for fault in faults:
            raise fault

        async def heard() -> AsyncIterator[str]:
            yield channels[0]
            await asyncio.Event().wait()

        yield heard()

    heard = Notices(SimpleNamespace(is_sqlite=False, listening=listening))  # type: ignore[arg-type]
    heard.start()
    async with asyncio.timeout(60):
        while not heard._is_hearing:
            await asyncio.sleep(0)
        await heard.wait("catalog")
    await heard.aclose()
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == [
        "What other servers change is looked for, as they are not heard"
    ]


async def test_files_that_cannot_be_removed_keep_no_others(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(settings) as rig:
        store = rig.catalog._blobs._store
        for name, seed in (("x", 1.0), ("y", 2.0), ("z", 3.0)):
            await rig.push(name, sound_files(seed))
        one, other, _ = store.blobs()
        really, stuck = store.remove, {one: StoreUnavailable("Not now."), other: RuntimeError("odd")}

        def remove(blob: str) -> None:
            if blob in stuck:
                raise stuck[blob]
            really(blob)

        monkeypatch.setattr(store, "remove", remove)
        for name in "xyz":
            await rig.call("DELETE", f"/v1/adapters/{name}")
        await rig.settle()
        assert store.blobs().keys() == stuck.keys()
        stuck.clear()
        await rig.catalog._freeing.free()
        assert not store.blobs()


async def test_files_stay_where_nobody_knows_whether_their_row_came(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit whose answer was lost may still come to its end after the next look at the database."""
    async with running(settings) as rig:
        registry = rig.catalog._registry
        really, late = registry.publish, []

        @contextmanager
        def cut() -> Iterator[None]:
            def publish(*args: Any, **options: Any) -> Any:
                late.append((args, options))
                raise DatabaseUnavailable("The database did not answer.")

            with monkeypatch.context() as patch:
                patch.setattr(registry, "publish", publish)
                yield

        with cut():
            assert (await rig.push("x")).status_code == 503
        for args, options in late:
            really(*args, **options)
        assert (await rig.call("GET", "/v1/adapters/x/versions/1/download")).status_code == 200
