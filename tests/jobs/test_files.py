"""Files of data without a server: pages of them, their removal by several at once, what is kept of their rows."""

from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from manylora.catalog.local_store import LocalStore
from manylora.database.database import Database
from manylora.database.tables import FileRow
from manylora.jobs.files import DataFiles
from manylora.lifecycle.data.data import MAX_LABEL_CHARS_TOLD, MAX_LABELS_TOLD, examine
from tests.lifecycle.helpers import write_rows

pytestmark = pytest.mark.anyio


class Sweeps(LocalStore):
    """A store at which, as it erases the first file, another server sweeps too."""

    other: Any = None

    def erase(self, name: str) -> None:
        other, self.other = self.other, None
        if other is not None:
            other()
        super().erase(name)


@pytest.fixture
def store(tmp_path: Path) -> Sweeps:
    return Sweeps(tmp_path / "store")


@pytest.fixture
async def files(database: Database, store: Sweeps, tmp_path: Path) -> AsyncIterator[DataFiles]:
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


async def test_two_servers_sweep_the_same_files(files: DataFiles, database: Database, store: Sweeps) -> None:
    add(database, "file-1", "file-2", expires=1)
    store.other = files.sweep
    await database.run(files.sweep)
    add(database, "file-3")
    store.other = files.sweep
    await files.delete("acme", "file-3")
    with database.read() as session:
        assert session.query(FileRow).count() == 0


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
