"""A store that cannot be used is refused at start in one line; servers on one database can share a folder."""

import asyncio
import errno
import fcntl
import os
import time
from pathlib import Path

import pytest

from manylora.catalog.files import FolderLock
from manylora.catalog.store import open_store
from manylora.errors import StartupError
from manylora.files import clear_folder
from manylora.settings import Settings

from . import postgres
from .rig import running, sound_files

pytestmark = pytest.mark.anyio


@pytest.fixture
def two(cluster: postgres.Cluster, tmp_path: Path) -> list[Settings]:
    """Settings of two servers with one database and one folder for the adapter files."""
    url, store = cluster.new_database(), f"file://{tmp_path}/shared"
    return [
        Settings(data_dir=tmp_path / name, database_url=url, store_url=store, max_adapter_size=2**22) for name in "ab"
    ]


@pytest.mark.slow
async def test_two_servers_share_a_folder(two: list[Settings]) -> None:
    async with running(two[0]) as a, running(two[1]) as b:
        for seed in (1.0, 2.0):
            assert (await a.push("x", sound_files(seed))).status_code == 201
        both = await asyncio.gather(a.push("y", sound_files(3.0)), b.push("z", sound_files(3.0)))
        assert [answer.status_code for answer in both] == [201, 201]
        for rig in (a, b):
            await rig.catalog.refresh()
            for name in ("x", "y", "z"):
                assert rig.catalog.local_folder(rig.catalog.directory.resolve("public", name)).is_dir()
        assert (await b.call("GET", "/v1/adapters/x/versions/1/download")).status_code == 200
        await b.call("DELETE", "/v1/adapters/y")  # z has the same files
        for rig in (b, a):
            await rig.catalog.refresh()
            await rig.settle()
        assert a.catalog.local_folder(a.catalog.directory.resolve("public", "z")).is_dir()
        for rig in (a, b):
            rig.catalog.check_integrity()


@pytest.mark.slow
async def test_a_start_beside_another_server_leaves_its_work_alone(two: list[Settings], tmp_path: Path) -> None:
    async with running(two[0]) as a:
        await a.push("x")
        staging = tmp_path / "shared" / "incoming" / "in-progress"
        staging.mkdir()
        (staging / "adapter_config.json").write_bytes(b"half")
        async with running(two[1]) as b:
            assert (await b.push("y", sound_files(2.0))).status_code == 201
        assert staging.is_dir()
        assert (await a.call("GET", "/v1/adapters/x/versions/1/download")).status_code == 200


@pytest.mark.slow
async def test_a_server_with_a_database_of_its_own_is_refused_with_the_reason(two: list[Settings]) -> None:
    alone = two[1].model_copy(update={"database_url": None})
    async with running(two[0]):
        with pytest.raises(StartupError, match="same PostgreSQL database") as caught:
            async with running(alone):
                pass
        assert "\n" not in caught.value.message
    async with running(alone):
        with pytest.raises(StartupError, match="same PostgreSQL database"):
            async with running(two[0]):
                pass


def test_a_shared_lock_keeps_an_exclusive_one_out_and_lets_others_in(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path, is_shared=True), FolderLock(tmp_path, is_shared=True)
    for holder in (first, second):
        with pytest.raises(StartupError):
            FolderLock(tmp_path)
        holder.release()
    FolderLock(tmp_path).release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_to_be_one(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(_descriptor: int, _how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(StartupError, match="has no locks"):
        FolderLock(tmp_path)


def test_clearing_leaves_what_is_young(tmp_path: Path) -> None:
    for name in ("old", "young"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    os.utime(tmp_path / "old", (0, time.time() - 100))
    clear_folder(tmp_path, older_than_s=50)
    assert [path.name for path in tmp_path.iterdir()] == ["young"]


@pytest.mark.parametrize(
    "url",
    [
        "local:///tmp/manylora-store",
        "http://127.0.0.1:9/store",
        "nosuch://x/y",
        "zip:///nothing.zip",
        "s3://",
        "reference://",
    ],
)
def test_a_store_that_cannot_be_used_is_one_line(url: str, tmp_path: Path) -> None:
    with pytest.raises(StartupError) as caught:
        open_store(url, tmp_path / "cache")
    assert "store_url" in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 600


@pytest.mark.usefixtures("s3")
def test_a_bucket_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="store_url s3://no-such-bucket/prefix cannot be used"):
        open_store("s3://no-such-bucket/prefix", tmp_path / "cache")


def test_a_bucket_that_can_be_used_is_left_as_it_was(s3: str, tmp_path: Path) -> None:
    store = open_store(f"{s3}/prefix", tmp_path / "cache")
    assert store.names("probes") == set()
