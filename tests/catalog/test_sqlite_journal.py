"""A journal that is beside a restored SQLite file, and is not its own."""

import shutil
import sqlite3
from pathlib import Path

import pytest

from manylora.database import sqlite_journal
from manylora.database.database import open_database
from manylora.errors import StartupError

NAME = "registry.sqlite3"


@pytest.fixture(autouse=True)
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any time counts as later: a test does not wait for half a minute."""
    monkeypatch.setattr(sqlite_journal, "_LATER_S", 0.0)


def open_and_close(folder: Path) -> None:
    open_database(f"sqlite:///{folder / NAME}").close()


@pytest.fixture
def backup(tmp_path: Path) -> Path:
    folder = tmp_path / "backup"
    open_and_close(folder)
    return folder / NAME


def killed(folder: Path, *, took_over: bool = False) -> None:
    """A data folder as a killed server leaves it: changes in the journal, or also in the file."""
    source = folder.with_name("source")
    open_and_close(source)
    with sqlite3.connect(source / NAME) as connection:
        connection.execute("PRAGMA wal_autocheckpoint=0")
        connection.execute("UPDATE revisions SET value = value + 7")
        connection.commit()
        if took_over:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        folder.mkdir()
        shutil.copy(source / NAME, folder / NAME)
        shutil.copy(source / f"{NAME}-wal", folder / f"{NAME}-wal")
    connection.close()


def put_later(source: Path, folder: Path) -> None:
    """Until the file system's clock has gone on."""
    content = source.read_bytes()
    while (folder / NAME).stat().st_ctime <= (folder / f"{NAME}-wal").stat().st_ctime:
        (folder / NAME).write_bytes(content)


def revisions(folder: Path) -> list[tuple[int]]:
    with sqlite3.connect(folder / NAME) as connection:
        found: list[tuple[int]] = connection.execute("SELECT value FROM revisions").fetchall()
    connection.close()
    return found


def test_a_journal_of_another_database_is_not_replayed(tmp_path: Path, backup: Path) -> None:
    folder = tmp_path / "data"
    killed(folder)
    put_later(backup, folder)

    with pytest.raises(StartupError, match=r"would be mixed into this one.*delete registry\.sqlite3-wal"):
        open_and_close(folder)
    assert (folder / NAME).read_bytes() == backup.read_bytes()

    (folder / f"{NAME}-wal").unlink()
    open_and_close(folder)
    assert revisions(folder) == revisions(backup.parent)


def test_who_knows_better_says_so(tmp_path: Path, backup: Path) -> None:
    folder = tmp_path / "data"
    killed(folder)
    put_later(folder / NAME, folder)
    with pytest.raises(StartupError, match="touch"):
        open_and_close(folder)

    while (folder / NAME).stat().st_ctime >= (folder / f"{NAME}-wal").stat().st_ctime:
        (folder / f"{NAME}-wal").touch()
    open_and_close(folder)
    assert [value for (value,) in revisions(folder)] == [value + 7 for (value,) in revisions(backup.parent)]


def test_a_file_that_has_all_of_its_journal_is_opened_however_late_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    killed(folder, took_over=True)
    put_later(folder / NAME, folder)
    before = revisions(folder.with_name("source"))
    open_and_close(folder)
    assert revisions(folder) == before


def test_what_a_killed_server_left_is_replayed(tmp_path: Path, backup: Path) -> None:
    folder = tmp_path / "data"
    killed(folder)
    open_and_close(folder)
    assert [value for (value,) in revisions(folder)] == [value + 7 for (value,) in revisions(backup.parent)]


@pytest.mark.parametrize("journal", [b"", b"short", b"\0" * 31, b"no journal at all, but long enough to have a header"])
def test_what_is_no_journal_is_left_to_sqlite(tmp_path: Path, backup: Path, journal: bytes) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / f"{NAME}-wal").write_bytes(journal)
    (folder / NAME).write_bytes(b"")
    put_later(backup, folder)
    open_and_close(folder)
    assert revisions(folder) == revisions(backup.parent)
