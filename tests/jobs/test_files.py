"""Files of data without a server: their quota, turns and pages, their way out, their removal by several at once."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest

from manylora.catalog.cache import DownloadCache
from manylora.catalog.local_store import LocalStore
from manylora.catalog.remote_store import RemoteStore
from manylora.catalog.store import open_store
from manylora.database.database import Database
from manylora.database.tables import FileRow
from manylora.errors import NotFound, QuotaExceeded, RateLimited, StoreUnavailable
from manylora.jobs import files as files_module
from manylora.jobs.files import MAX_TRANSFERS, DataFiles
from manylora.jobs.records import DataFile
from manylora.lifecycle.data.data import MAX_LABEL_CHARS_TOLD, MAX_LABELS_TOLD, examine
from manylora.tenants.limits import TenantStore
from tests.lifecycle.helpers import write_rows

pytestmark = pytest.mark.anyio
ROWS = b'{"text": "apple", "label": "fruit"}\n{"text": "saw", "label": "tool"}\n'
PATIENCE_S = 60.0
ON_SQLITE = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


class OddStore(LocalStore):
    """As it erases the first file, another server sweeps too; while `closed` is not set, nothing is fetched."""

    other: Any = None

    closed: threading.Event | None = None

    def fetch_file(self, name: str, target: Path) -> bool:
        assert self.closed is None or self.closed.wait(PATIENCE_S)
        return super().fetch_file(name, target)

    def erase(self, name: str) -> None:
        other, self.other = self.other, None
        if other is not None:
            other()
        super().erase(name)


@pytest.fixture
def store(tmp_path: Path) -> OddStore:
    return OddStore(tmp_path / "store")


@pytest.fixture
async def files(database: Database, store: OddStore, tmp_path: Path) -> AsyncIterator[DataFiles]:
    files = DataFiles(database, store, tmp_path / "received", max_bytes=2**20, kept_days=1.0)
    yield files
    await files.aclose()
    store.close()


def add(database: Database, *ids: str, labels: list[str] | None = None, expires: int | None = None) -> None:
    facts = {"num_rows": 2, "shape": "label", "labels": labels}
    with database.write(None) as session:
        for file_id in ids:
            row = FileRow(
                id=file_id, tenant="acme", filename="a.jsonl", purpose="fine-tune", size_bytes=1, sha256="",
                facts=facts, is_whole=True, created=1, expires=expires,
            )  # fmt: skip
            session.add(row)


async def test_a_page_of_files_leaves_their_labels_out(files: DataFiles, database: Database) -> None:
    add(database, "file-1", "file-2", labels=["fruit", "tool"])
    (last, first), has_more = await files.page("acme", purpose=None, limit=2, after=None, is_ascending=False)
    assert (last.id, first.id, has_more) == ("file-2", "file-1", False)
    assert first.facts == {"num_rows": 2, "shape": "label"}
    assert (await files.get("acme", "file-1")).facts["labels"] == ["fruit", "tool"]


@ON_SQLITE
@pytest.mark.slow
async def test_files_in_an_object_store_come_back_whole_and_go(database: Database, s3: str, tmp_path: Path) -> None:
    store = open_store(f"{s3}/store", tmp_path / "cache")
    files = DataFiles(database, store, tmp_path / "received", max_bytes=2**24, kept_days=1.0)
    upload = Upload(num_more=40)
    kept = await upload.sent_to(files)
    assert kept.size_bytes == len(ROWS) + 40 * 2**18
    await files.fetch(kept, tmp_path / "back.jsonl")
    assert (tmp_path / "back.jsonl").read_bytes() == ROWS + b" " * 40 * 2**18
    assert list((tmp_path / "received").iterdir()) == []

    store.write(kept.place, ROWS)
    with pytest.raises(StoreUnavailable, match="damaged"):
        await files.fetch(kept, tmp_path / "back.jsonl")

    await files.delete("acme", kept.id)
    assert store.names("files") == set()
    with pytest.raises(NotFound):
        await files.get("acme", kept.id)
    await files.aclose()
    store.close()


async def test_two_servers_sweep_the_same_files(files: DataFiles, database: Database, store: OddStore) -> None:
    add(database, "file-1", "file-2", expires=1)
    store.other = files.sweep
    await database.run(files.sweep)
    add(database, "file-3")
    store.other = files.sweep
    await files.delete("acme", "file-3")
    with database.read() as session:
        assert session.query(FileRow).count() == 0


@dataclass
class Upload:
    """A form with rows and more behind them. `num_sent`: how many pieces of it were asked for."""

    num_more: int = 0
    num_sent: int = 0

    async def body(self) -> AsyncIterator[bytes]:
        head = 'content-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--x\r\n'
        name = 'content-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
        for piece in (f"--x\r\n{head}{name}".encode(), ROWS, *[b" " * 2**18] * self.num_more, b"\r\n--x--\r\n"):
            self.num_sent += 1
            yield piece

    async def sent_to(self, files: DataFiles, tenant: str = "acme") -> DataFile:
        return await files.add(tenant, self.body(), "multipart/form-data; boundary=x", None)


async def test_an_upload_beyond_its_quota_costs_little(
    files: DataFiles, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = await Upload().sent_to(files)
    examined = list[Path]()
    monkeypatch.setattr(files, "_examined", examined.append)
    set_quota = TenantStore(database).change
    for quota, num_more, most_sent in ((len(ROWS), 0, 0), (len(ROWS) + 1, 0, 4), (len(ROWS) + 1, 40, 8)):
        set_quota("acme", max_file_bytes=quota)
        upload = Upload(num_more)
        with pytest.raises(QuotaExceeded):
            await upload.sent_to(files)
        assert upload.num_sent <= most_sent
    set_quota("acme", max_file_bytes=2**30)
    monkeypatch.setattr(files_module, "MAX_FILES", 1)
    with pytest.raises(QuotaExceeded, match="as many as it may"):
        await (last := Upload()).sent_to(files)
    assert (last.num_sent, examined) == (0, [])
    await files.delete("acme", kept.id)


@ON_SQLITE
async def test_a_tenants_files_are_examined_in_turn_with_those_of_others(
    files: DataFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = list[str]()
    monkeypatch.setattr(files, "_examined", lambda path, _name: order.append(path.name))
    asked = [("acme", "1"), ("acme", "2"), ("acme", "3"), ("other", "4")]
    await asyncio.gather(*(files._facts(tenant, Path(name), name) for tenant, name in asked))
    assert order == ["1", "4", "2", "3"]


@ON_SQLITE
async def test_a_tenant_fetches_some_files_at_a_time_and_no_copies(
    files: DataFiles, store: OddStore, tmp_path: Path
) -> None:
    kept, others = await Upload().sent_to(files), await Upload().sent_to(files, "other")
    async with AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(files.content("acme", kept.id)) for _ in range(MAX_TRANSFERS)]
        for refused in (files.content("acme", kept.id).__aenter__(), Upload().sent_to(files)):
            with pytest.raises(RateLimited):
                await refused
        async with files.content("other", others.id) as (_, content):
            assert content.read() == ROWS
        assert list((tmp_path / "received").iterdir()) == []
        await files.delete("acme", kept.id)
        assert opened[-1][1].read() == ROWS
    assert opened[-1][1].closed
    (tmp_path / "store" / others.place).write_bytes(ROWS[::-1])
    for _ in range(MAX_TRANSFERS + 1):
        with pytest.raises(StoreUnavailable, match="damaged"):
            await files.content("other", others.id).__aenter__()


@ON_SQLITE
async def test_a_slow_store_keeps_nobody_from_the_database(
    files: DataFiles, database: Database, store: OddStore, tmp_path: Path
) -> None:
    kept = await Upload().sent_to(files)
    store.closed = threading.Event()
    fetches = [asyncio.create_task(files.fetch(kept, tmp_path / str(n))) for n in range(20)]
    try:
        await asyncio.sleep(0)  # all of them are on their way
        assert (await asyncio.wait_for(files.get("acme", kept.id), PATIENCE_S / 2)).id == kept.id
    finally:
        store.closed.set()
        await asyncio.gather(*fetches)
    assert (tmp_path / "19").read_bytes() == ROWS


def test_a_file_of_an_object_store_is_opened_and_no_copy_is_left(tmp_path: Path) -> None:
    store = RemoteStore(fsspec.filesystem("memory"), f"/{tmp_path.name}", DownloadCache(tmp_path / "cache"))
    (tmp_path / "rows").write_bytes(ROWS)
    store.keep_file("files/file-1", tmp_path / "rows")
    content = store.open_file("files/file-1", tmp_path / "copy")
    assert content is not None
    with content:
        assert not (tmp_path / "copy").exists()
        assert content.read() == ROWS
    assert store.open_file("files/file-2", tmp_path / "copy") is None
    store.erase("files/file-1")


def test_no_more_is_told_of_labels_than_is_easily_kept(tmp_path: Path) -> None:
    few = [{"text": "a", "label": "x" * (MAX_LABEL_CHARS_TOLD - 1)}, {"text": "b", "label": "y"}]
    assert len(examine(write_rows(tmp_path / "few.jsonl", few * 2)).labels or ()) == 2
    long = [*few, {"text": "c", "label": "z"}]
    assert asdict(examine(write_rows(tmp_path / "long.jsonl", long))) == {
        "num_rows": 3,
        "shape": "label",
        "labels": None,
    }
    many = [{"text": "a", "label": str(n)} for n in range(MAX_LABELS_TOLD + 1)]
    assert examine(write_rows(tmp_path / "many.jsonl", many)).labels is None
