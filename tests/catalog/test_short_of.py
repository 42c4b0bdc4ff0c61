"""A full disk, and no descriptors left: one sentence with the cause, nothing half done, and all is well afterwards."""

import asyncio
import os
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from manylora.catalog.service import Catalog
from manylora.database import database as database_module
from manylora.database.database import _begin_sqlite as begin_sqlite
from manylora.errors import ManyloraError
from manylora.settings import Settings

from .rig import MODULES, Rig, files_of, running, sound_files

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).parents[2]


@contextmanager
def limited(kind: int, soft: int) -> Iterator[None]:
    """No file longer than so many bytes, or no more open files than so many: for this process, until the end."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@contextmanager
def full_disk(longest: int = 0) -> Iterator[None]:
    """Every write beyond the first bytes of a file fails, as on a disk that is full."""
    with limited(resource.RLIMIT_FSIZE, longest):
        yield


@contextmanager
def few_descriptors(spare: int) -> Iterator[None]:
    """No more than `spare` further files and connections."""
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))  # noqa: PTH208
    taken = []
    with limited(resource.RLIMIT_NOFILE, highest + 1):
        try:
            while True:
                taken.append(os.dup(0))
        except OSError:
            pass
        for descriptor in taken[:spare]:
            os.close(descriptor)
        try:
            yield
        finally:
            for descriptor in taken[spare:]:
                os.close(descriptor)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> "Disk":
    disk = Disk()
    monkeypatch.setattr(database_module, "_begin_sqlite", disk.begin)
    return disk


@pytest.fixture(autouse=True)
def log_in_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed goes to no file, which could not be written either."""


async def nothing_left(rig: Rig) -> None:
    for _ in range(600):
        if not list((rig.settings.data_dir / "quarantine").iterdir()):
            break
        await asyncio.sleep(0.05)
    assert list((rig.settings.data_dir / "quarantine").iterdir()) == []
    assert list((rig.settings.data_dir / "store" / "incoming").glob("*")) == []


def one_sentence(error: dict[str, Any]) -> str:
    message: str = error["message"]
    assert "\n" not in message
    assert "Traceback" not in message
    return message


async def test_an_upload_on_a_full_disk_is_507_and_leaves_nothing(settings: Settings) -> None:
    files = sound_files()
    async with running(settings) as rig:
        for longest in (0, 100, 400, 1500, 2842):
            with full_disk(longest):
                answer = await rig.push("x", files)
            assert answer.status_code == 507, (longest, answer.text)
            assert answer.json()["error"]["code"] == "storage_full"
            assert "full" in one_sentence(answer.json()["error"])
            assert answer.headers["retry-after"]
            await nothing_left(rig)
            assert rig.stored() == []
        assert (await rig.push("x")).status_code == 201
        assert files_of(rig.catalog.local_folder(rig.catalog.directory.resolve("public", "x"))) == sound_files()


async def test_an_upload_that_the_database_has_no_room_for_leaves_nothing(settings: Settings, disk: "Disk") -> None:
    async with running(settings) as rig:
        disk.is_full = True
        answer = await rig.push("x", description="d" * 4096)
        assert answer.status_code == 507, answer.text
        assert answer.json()["error"]["code"] == "storage_full"
        disk.is_full = False
        await nothing_left(rig)
        assert rig.stored() == []
        assert (await rig.push("x")).status_code == 201


async def test_a_change_that_the_database_has_no_room_for_changes_nothing(settings: Settings, disk: "Disk") -> None:
    async with running(settings) as rig:
        await rig.push("x", description="before")
        disk.is_full = True
        answer = await rig.call("PATCH", "/v1/adapters/x", json={"description": "d" * 4096})
        assert (answer.status_code, answer.json()["error"]["code"]) == (507, "storage_full"), answer.text
        disk.is_full = False
        assert (await rig.call("GET", "/v1/adapters/x")).json()["description"] == "before"
        rig.catalog.check_integrity()


class Disk:
    """While it `is_full`, SQLite takes no further page, and says so as on a disk that is full."""

    is_full = False

    def begin(self, connection: Connection) -> None:
        begin_sqlite(connection)
        connection.exec_driver_sql(f"PRAGMA max_page_count={1 if self.is_full else 2**30}")


@pytest.mark.parametrize("longest", [0, 1000, 3000])
async def test_a_change_on_a_full_disk_says_the_cause(settings: Settings, longest: int) -> None:
    async with running(settings) as rig:
        await rig.push("x", description="before")
        with full_disk(longest):
            answer = await rig.call("PATCH", "/v1/adapters/x", json={"description": "after"})
        assert answer.status_code in (503, 507), answer.text
        assert "disk" in one_sentence(answer.json()["error"])
        assert (await rig.call("GET", "/v1/adapters/x")).json()["description"] == "before"
        assert (await rig.call("PATCH", "/v1/adapters/x", json={"description": "after"})).status_code == 200


async def test_a_download_on_a_full_disk_is_507(settings: Settings) -> None:
    async with running(settings) as rig:
        await rig.push("x")
        with full_disk(10):
            answer = await rig.call("GET", "/v1/adapters/x/versions/1/download")
        assert (answer.status_code, answer.json()["error"]["code"]) == (507, "storage_full")
        assert (await rig.call("GET", "/v1/adapters/x/versions/1/download")).status_code == 200


async def test_an_upload_without_descriptors_leaves_nothing(settings: Settings) -> None:
    async with running(settings) as rig:
        await rig.push("warm", sound_files(9.0))  # what is opened once is open
        seen = set()
        for spare in range(14):
            files = sound_files(spare + 1.0)
            with few_descriptors(spare):
                answer = await rig.push(f"x{spare}", files)
            seen.add(answer.status_code)
            if answer.status_code != 201:
                assert answer.status_code == 503, answer.text
                one_sentence(answer.json()["error"])
            await nothing_left(rig)
        assert 503 in seen
        assert (await rig.push("y")).status_code == 201
        rig.catalog.check_integrity()


@pytest.mark.parametrize("is_new", [True, False])
async def test_a_start_on_a_full_disk_is_one_sentence(settings: Settings, is_new: bool) -> None:
    if not is_new:
        async with running(settings) as rig:
            await rig.push("x")
    settings.data_dir.mkdir(exist_ok=True)
    with full_disk(), pytest.raises(ManyloraError) as caught:
        Catalog.open(settings, MODULES)
    one_sentence({"message": caught.value.message})
    async with running(settings) as rig:
        assert (await rig.push("x")).status_code in (200, 201)


@pytest.mark.parametrize("words", [("serve", "--port", "0"), ("keys", "list"), ("keys", "create", "--tenant", "a")])
async def test_a_command_on_a_full_disk_ends_in_one_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    code = (
        "import resource, sys\n"
        "from manylora.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        f"sys.argv = ['manylora', *{words!r}, '--data-dir', {str(tmp_path / 'data')!r}]\n"
        "main()\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MANYLORA_")}
    more = ["--host", "0.0.0.0"] if words[0] == "serve" else []
    done = subprocess.run(
        [sys.executable, "-c", code.replace("'--data-dir'", "".join(f"{w!r}, " for w in more) + "'--data-dir'")],
        capture_output=True, text=True, check=False, env=clean, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if "is starting" not in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")


async def test_while_another_program_locks_the_database_nothing_is_changed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "_BUSY_TIMEOUT_MS", 100)
    async with running(settings) as rig:
        await rig.push("x", description="before")
        before = rig.stored()
        with closing(sqlite3.connect(settings.data_dir / "registry.sqlite3", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for answer in (
                await rig.push("y", sound_files(2.0)),
                await rig.call("PATCH", "/v1/adapters/x", json={"description": "after"}),
                await rig.call("DELETE", "/v1/adapters/x"),
            ):
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_unavailable")
                assert "lock" in one_sentence(answer.json()["error"])
                assert answer.headers["retry-after"]
            assert (await rig.call("GET", "/v1/adapters/x")).json()["description"] == "before"
            other.execute("ROLLBACK")
        await nothing_left(rig)
        assert rig.stored() == before
        assert (await rig.push("y", sound_files(2.0))).status_code == 201
