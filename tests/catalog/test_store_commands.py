"""`manylora adapters verify`, `rescan` and `orphans` as an operator runs them."""

import asyncio
import json
import os
import shutil
from pathlib import Path

import pytest
from sqlalchemy import delete, select
from typer.testing import CliRunner, Result

from manylora.catalog.files import FolderLock
from manylora.catalog.labels import Label, active_of
from manylora.cli.main import build
from manylora.database.database import open_database
from manylora.database.tables import AdapterRow, VersionRow
from manylora.errors import StartupError
from manylora.settings import Settings

from .rig import TENSOR_FILE, running, sound_files


def run(settings: Settings, *words: str, typed: str | None = None) -> Result:
    return CliRunner().invoke(build(), ["adapters", *words, "--data-dir", str(settings.data_dir)], input=typed)


def stored(settings: Settings, where: str = "??") -> list[Path]:
    return sorted((settings.data_dir / "store").glob(f"{where}/*"))


@pytest.fixture
def data(settings: Settings) -> Settings:
    """A data folder with the adapters acme/x and acme/y, without a server."""

    async def fill() -> None:
        async with running(settings, "acme:manager") as rig:
            await rig.push("x", sound_files(1.0), "acme:manager")
            await rig.push("y", sound_files(2.0), "acme:manager")

    asyncio.run(fill())
    return settings


def lose_database(settings: Settings) -> None:
    for file in settings.data_dir.glob("registry.sqlite3*"):
        file.unlink()


def start(settings: Settings) -> None:
    async def open_and_close() -> None:
        async with running(settings):
            pass

    asyncio.run(open_and_close())


def test_verify_names_what_is_damaged_and_mends_it(data: Settings, tmp_path: Path) -> None:
    assert run(data, "verify").stdout == "2 checked, 0 mended, 0 damaged\n"
    shutil.copytree(data.data_dir / "store", tmp_path / "backup")
    first, second = stored(data)
    (first / TENSOR_FILE).write_bytes(b"other")
    shutil.rmtree(second)
    damaged = run(data, "verify")
    assert (damaged.exit_code, damaged.stdout.count("DAMAGED: acme/")) == (1, 2)
    assert damaged.stdout.endswith("2 checked, 0 mended, 2 damaged\n")
    as_json = json.loads(run(data, "verify", "--json").stdout)
    assert (as_json["sound"], as_json["left"], len(as_json["faults"])) == (0, 2, 2)
    mended = run(data, "verify", "--repair-from", str(tmp_path / "backup"))
    assert (mended.exit_code, mended.stdout.count("mended: acme/")) == (0, 2)
    assert run(data, "verify").stdout == "2 checked, 0 mended, 0 damaged\n"


def test_verify_does_not_need_the_server_to_stop(data: Settings) -> None:
    locks = [FolderLock(data.data_dir), FolderLock(data.data_dir / "store")]
    assert run(data, "verify").exit_code == 0
    assert run(data, "orphans").exit_code == 0
    for words in (("rescan",), ("orphans", "--drop", "--yes")):
        refused = run(data, *words)
        assert isinstance(refused.exception, StartupError)
        assert "Stop it" in refused.exception.message
    for lock in locks:
        lock.release()


@pytest.mark.parametrize("words", [("verify",), ("orphans", "--drop", "--yes")])
def test_another_servers_store_is_refused(data: Settings, words: tuple[str, ...]) -> None:
    lose_database(data)
    open_database(data.resolved_database_url).close()
    (folder,) = put_aside(data, stored(data)[0])
    refused = run(data, *words)
    assert isinstance(refused.exception, StartupError)
    assert "belongs to another registry" in refused.exception.message
    assert folder.is_dir()


def put_aside(settings: Settings, *folders: Path) -> list[Path]:
    aside = settings.data_dir / "store" / "orphans"
    aside.mkdir()
    moved = [folder.rename(aside / folder.name) for folder in folders]
    for folder in moved:
        os.utime(folder)
    return moved


@pytest.mark.parametrize(
    "words",
    [
        ("adapters", "verify"), ("adapters", "rescan"), ("adapters", "orphans"), ("adapters", "orphans", "--drop"),
        ("keys", "list"), ("keys", "revoke", "abcd"), ("tenants", "list"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_there_is_no_empty_server(words: tuple[str, ...], tmp_path: Path) -> None:
    refused = CliRunner().invoke(build(), [*words, "--data-dir", str(tmp_path / "typo")])
    assert isinstance(refused.exception, StartupError), refused.output
    assert refused.exception.message.startswith("There is no ")
    assert not (tmp_path / "typo").exists()


def test_a_server_that_had_no_keys_is_not_reopened(tmp_path: Path) -> None:
    refused = CliRunner().invoke(build(), ["keys", "reopen", "--yes", "--data-dir", str(tmp_path / "typo")])
    assert refused.exit_code != 0
    assert "had keys" in refused.output
    assert not (tmp_path / "typo").exists()


def test_who_looks_after_a_lost_database_makes_none(data: Settings) -> None:
    lose_database(data)
    for words in (("verify",), ("orphans",)):
        refused = run(data, *words)
        assert isinstance(refused.exception, StartupError)
        assert "manylora adapters rescan" in refused.exception.message
    assert not list(data.data_dir.glob("registry.sqlite3*"))


def test_a_lost_database_comes_back_by_a_rescan(data: Settings) -> None:
    lose_database(data)
    done = run(data, "rescan")
    assert done.stdout.splitlines() == ["registered: acme/x@1", "registered: acme/y@1", "2 registered, 0 were known"]
    again = json.loads(run(data, "rescan", "--json").stdout)
    assert (again["registered"], again["known"]) == ([], 2)
    key = CliRunner().invoke(build(), ["keys", "create", "--tenant", "acme", "--data-dir", str(data.data_dir)])
    assert key.exit_code == 0
    start(data)
    assert run(data, "verify").exit_code == 0


def test_a_rescan_makes_active_what_was(settings: Settings) -> None:
    async def fill() -> None:
        async with running(settings, "acme:manager") as rig:
            for name in ("stayed", "back", "never"):
                for seed in (1.0, 2.0):
                    await rig.push(name, sound_files(seed), "acme:manager", activate=str(name == "back").lower())
            for number in (2, 1):
                await rig.call("PATCH", "/v1/adapters/stayed", "acme:manager", json={"active_version": number})
            await rig.call("POST", "/v1/adapters/back/rollback", "acme:manager", json={})

    asyncio.run(fill())
    lose_database(settings)
    assert run(settings, "rescan").exit_code == 0
    database = open_database(settings.resolved_database_url)
    with database.read() as session:
        rows = session.execute(select(AdapterRow.name, AdapterRow.active_version))
        active = {name: version for name, version in rows}  # noqa: C416 - rows are no tuples for mypy
    database.close()
    assert active == {"stayed": 1, "back": 1, "never": None}


def test_of_labels_that_do_not_say_which_was_active_the_newest_is() -> None:
    def label(version: int, switched: int | None) -> Label:
        facts = {"tenant": "acme", "name": "x", "created": 0, "digest": "", "base": "", "kind": "lora", "rank": 1}
        more = {"alpha": 1.0, "target_modules": (), "size_bytes": 1, "report": {}, "blob": "0" * 64}
        return Label(version_id=f"version_{version:024}", version=version, switched=switched, **facts, **more)

    def active(*switched: int | None) -> int | None:
        found = active_of([label(number, at) for number, at in enumerate(switched, 1)])
        return None if found is None else found.version

    assert active(None, None) == 2
    assert active(None, 7, 5) == 2
    assert active(None, 0, 0) == 1
    assert active(9, 7, 0) == 1
    assert active(0, 0) is None


def test_a_label_says_all_that_the_registry_knows_of_a_version() -> None:
    """A column without a field would be forgotten by a rescan. A mix has no files, so no label."""
    columns = {column.name for column in VersionRow.__table__.columns} - {"id", "adapter_id", "mix"}
    columns -= {"card_bytes"}  # which is that of `card`
    assert Label.model_fields.keys() == columns | {"version_id", "tenant", "name", "switched"}


def test_orphans_are_listed_and_dropped(data: Settings) -> None:
    forget(data, "x", "y")
    put_aside(data, *stored(data))
    listed = json.loads(run(data, "orphans", "--json").stdout)
    assert sorted(row["versions"] for row in listed) == [["acme/x@1"], ["acme/y@1"]]
    assert all(row["until"] - row["since"] == 30 * 86_400 for row in listed)
    assert "acme/x@1" in run(data, "orphans").stdout
    assert run(data, "orphans", "--drop", typed="n\n").exit_code != 0
    assert len(stored(data, "orphans")) == 2
    dropped = run(data, "orphans", "--drop", "--yes")
    assert (dropped.exit_code, dropped.stdout.count("dropped")) == (0, 2)
    assert stored(data, "orphans") == stored(data, "labels") == []


def forget(settings: Settings, *names: str) -> None:
    """As a database from before these were uploaded."""
    database = open_database(settings.resolved_database_url)
    with database.write("catalog") as session:
        ids = session.execute(select(AdapterRow.id).where(AdapterRow.name.in_(names))).scalars().all()
        session.execute(delete(VersionRow).where(VersionRow.adapter_id.in_(ids)))
        session.execute(delete(AdapterRow).where(AdapterRow.id.in_(ids)))
    database.close()


def test_what_the_database_knows_again_is_not_dropped(data: Settings, tmp_path: Path) -> None:
    file = data.data_dir / "registry.sqlite3"
    shutil.copy(file, tmp_path / "newer")
    forget(data, "x")
    start(data)
    assert len(stored(data, "orphans")) == 1
    lose_database(data)
    shutil.copy(tmp_path / "newer", file)
    (row,) = json.loads(run(data, "orphans", "--drop", "--yes", "--json").stdout)
    assert (row["versions"], row["dropped"]) == (["acme/x@1"], False)
    assert run(data, "verify").stdout == "2 checked, 0 mended, 0 damaged\n"
    assert stored(data, "orphans") == []


def test_a_second_copy_that_is_dropped_takes_no_label_with_it(data: Settings) -> None:
    forget(data, "x", "y")
    first, _ = stored(data)
    shutil.copytree(first, data.data_dir / "store" / "orphans" / first.name)
    assert run(data, "orphans", "--drop", "--yes").exit_code == 0
    assert run(data, "rescan").stdout.endswith("2 registered, 0 were known\n")


def test_what_is_damaged_is_not_registered_and_the_exit_code_says_so(data: Settings) -> None:
    lose_database(data)
    (stored(data)[0] / TENSOR_FILE).write_bytes(b"other")
    done = run(data, "rescan")
    assert (done.exit_code, done.stdout.count("registered: ")) == (1, 1)
    assert "not those that were stored" in done.stdout


@pytest.mark.slow
def test_files_without_labels_are_validated_for_a_tenant(data: Settings, tiny_base: Path) -> None:
    lose_database(data)
    for label in stored(data, "labels"):
        label.unlink()
    unchanged = run(data, "rescan")
    assert (unchanged.exit_code, unchanged.stdout.count("without a label: ")) == (1, 2)
    assert "Say with --tenant" in unchanged.stdout
    done = run(data, "rescan", "--tenant", "acme", "--model", str(tiny_base))
    assert (done.exit_code, done.stdout.count("registered: acme/recovered-")) == (0, 2), done.output
