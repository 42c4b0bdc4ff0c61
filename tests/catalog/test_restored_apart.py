"""Database and store are restored apart from each other: whichever is wrong, empty or older, no adapter is lost."""

import logging
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from sqlalchemy import delete

from manylora.catalog import belonging, blobs, labels
from manylora.catalog.base_signature import signature_of
from manylora.catalog.belonging import owner_of, registry_id
from manylora.catalog.files import blob_of_folder as blob_of
from manylora.catalog.rescan import Unnamed, rescan
from manylora.catalog.service import Catalog
from manylora.catalog.store import Store, open_store
from manylora.catalog.upload import Rules, new_version
from manylora.catalog.verify import verify
from manylora.database.database import Database, open_database
from manylora.database.tables import AdapterRow, VersionRow
from manylora.errors import AdapterLoadFailed, StartupError
from manylora.identity import ADAPTER_FILES
from manylora.lora.format.spec import ModuleSpec
from manylora.settings import Settings
from manylora.tenants.interface import Role
from manylora.tenants.keys import KeyStore

from .rig import MODULES, Rig, files_of, running, sound_files, write_sound

pytestmark = pytest.mark.anyio

OWNERS = (("x", "acme:manager"), ("y", "ops:admin"))


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.slow)])
def settings(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """On a folder of this machine, and on a bucket, in which what was just written may be another server's."""
    monkeypatch.setattr(blobs, "_SHARED_GRACE_S", -1.0)
    settings = Settings(data_dir=tmp_path / "data", max_adapter_size=4 * 2**20)
    if request.param == "bucket":
        settings = settings.model_copy(update={"store_url": f"{request.getfixturevalue('s3')}/store"})
    return settings


@pytest.fixture
def store_of(settings: Settings) -> Iterator[Callable[[], Store]]:
    """The store as it is, seen from outside."""
    opened = []

    def look() -> Store:
        opened.append(open_store(settings.resolved_store_url, settings.data_dir / "look", is_exclusive=False))
        return opened[-1]

    yield look
    for store in opened:
        store.close()


def registry(settings: Settings) -> Path:
    return settings.data_dir / "registry.sqlite3"


def backup(settings: Settings, target: Path) -> None:
    """The documented one."""
    with sqlite3.connect(registry(settings)) as database:
        database.execute(f"VACUUM INTO '{target}'")
    database.close()


def restore(source: Path, settings: Settings) -> None:
    for leftover in ("-wal", "-shm"):
        registry(settings).with_name(f"registry.sqlite3{leftover}").unlink(missing_ok=True)
    shutil.copy(source, registry(settings))


def lose_database(settings: Settings) -> None:
    for file in settings.data_dir.glob("registry.sqlite3*"):
        file.unlink()


def served(rig: Rig, name: str) -> dict[str, bytes]:
    return files_of(rig.catalog.local_folder(rig.catalog.directory.resolve("public", name)))


async def upload_two(settings: Settings) -> None:
    async with running(settings) as rig:
        await rig.push("x")
        await rig.push("y", sound_files(2.0))


async def test_an_empty_database_deletes_nothing_and_does_not_start(
    settings: Settings, store_of: Callable[[], Store]
) -> None:
    await upload_two(settings)
    before = store_of().blobs().keys()
    other = settings.model_copy(update={"database_url": f"sqlite:///{settings.data_dir}/other.sqlite3"})
    for _ in range(2):
        with pytest.raises(StartupError) as caught:
            Catalog.open(other, MODULES)
        assert "belongs to another registry" in caught.value.message
        assert "manylora adapters rescan" in caught.value.message
        assert "\n" not in caught.value.message
    assert store_of().blobs().keys() == before
    assert store_of().orphans() == []
    async with running(settings) as rig:
        assert served(rig, "x") == sound_files()


async def test_a_database_of_another_server_is_refused_as_well(
    settings: Settings, store_of: Callable[[], Store], tmp_path: Path
) -> None:
    await upload_two(settings)
    other = Settings(data_dir=tmp_path / "elsewhere")
    async with running(other) as rig:
        await rig.push("z", sound_files(3.0))
    mixed = settings.model_copy(update={"database_url": other.resolved_database_url})
    with pytest.raises(StartupError, match="--take-over"):
        Catalog.open(mixed, MODULES)
    assert len(store_of().blobs()) == 2


async def test_what_an_older_database_does_not_know_is_set_aside_and_comes_back(
    settings: Settings, store_of: Callable[[], Store], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(settings) as rig:
        await rig.push("x")
        backup(settings, tmp_path / "old")
        await rig.push("y", sound_files(2.0))
    backup(settings, tmp_path / "new")
    restore(tmp_path / "old", settings)
    with caplog.at_level(logging.WARNING):
        async with running(settings) as rig:
            assert served(rig, "x") == sound_files()
            assert (await rig.call("GET", "/v1/adapters/y")).status_code == 404
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "files of 1 adapters" in said
    assert "manylora adapters rescan" in said
    assert "manylora adapters orphans --drop" in said
    (orphan,) = store_of().orphans()
    assert store_of().fault(orphan.blob, is_orphan=True) is None

    restore(tmp_path / "new", settings)
    async with running(settings) as rig:
        assert served(rig, "y") == sound_files(2.0)
        rig.catalog.check_integrity()
    assert store_of().orphans() == []


async def test_a_running_server_brings_back_what_another_start_set_aside(
    settings: Settings, store_of: Callable[[], Store]
) -> None:
    async with running(settings) as rig:
        await rig.push("x")
        (blob,) = store_of().blobs()
        rig.catalog._store.set_aside(blob)
        assert not store_of().has(blob)
        assert served(rig, "x") == sound_files()
        assert (await rig.call("GET", "/v1/adapters/x/versions/1/download")).status_code == 200


async def test_a_database_restored_under_a_running_server_costs_no_files(
    settings: Settings, store_of: Callable[[], Store]
) -> None:
    async with running(settings) as rig:
        await rig.push("x")
        before = store_of().blobs().keys()
        with rig.catalog.database.write("catalog") as session:  # as if by `pg_restore`
            session.execute(delete(VersionRow))
            session.execute(delete(AdapterRow))
        await rig.catalog.refresh()
        await rig.settle()
        assert store_of().blobs().keys() == before


async def test_what_somebody_deletes_is_gone_with_its_label(settings: Settings, store_of: Callable[[], Store]) -> None:
    async with running(settings) as rig:
        await rig.push("x")
        await rig.push("y")
        await rig.call("DELETE", "/v1/adapters/x")
        await rig.settle()
        assert len(store_of().names(labels.FOLDER)) == 1
        await rig.call("DELETE", "/v1/adapters/y")
        await rig.settle()
        assert store_of().blobs() == {}
        assert store_of().names(labels.FOLDER) == set()


async def test_orphans_go_after_their_days_and_not_before(
    settings: Settings, store_of: Callable[[], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    await upload_two(settings)
    database = open_database(settings.resolved_database_url)
    forget_versions(database, "y")
    database.close()
    for days, left in ((1.0, 1), (1e-9, 0)):
        async with running(settings.model_copy(update={"orphan_days": days})):
            assert len(store_of().orphans()) == left
        assert len(store_of().blobs()) == 1
    assert len(store_of().names(labels.FOLDER)) == 1


def forget_versions(database: Database, name: str) -> None:
    with database.write("catalog") as session:
        row = session.query(AdapterRow).filter(AdapterRow.name == name).one()
        session.execute(delete(VersionRow).where(VersionRow.adapter_id == row.id))
        row.is_deleted, row.active_version = True, None


async def test_a_store_from_before_marks_is_not_taken_by_an_empty_database(
    settings: Settings, store_of: Callable[[], Store]
) -> None:
    await upload_two(settings)
    store_of().erase("registry")
    other = settings.model_copy(update={"database_url": f"sqlite:///{settings.data_dir}/other.sqlite3"})
    with pytest.raises(StartupError, match="never had an adapter"):
        Catalog.open(other, MODULES)
    assert len(store_of().blobs()) == 2
    async with running(settings):  # its own database takes it
        assert store_of().read("registry")


async def test_a_lost_database_is_made_again_from_the_store(settings: Settings, store_of: Callable[[], Store]) -> None:
    async with running(settings, "acme:manager", "ops:admin") as rig:
        for seed in (1.0, 2.0):
            await rig.push("x", sound_files(seed), "acme:manager", description="d", activate="true")
        await rig.push("y", sound_files(1.0), "ops:admin")
        before = {name: (await rig.call("GET", f"/v1/adapters/{name}", who)).json() for name, who in OWNERS}
    lose_database(settings)
    with pytest.raises(StartupError):
        Catalog.open(settings, MODULES)
    database, store = open_database(settings.resolved_database_url), store_of()
    found = rescan(database, store)
    assert [(r.tenant, r.name, r.version) for r in found.registered] == [
        ("acme", "x", 1),
        ("acme", "x", 2),
        ("ops", "y", 1),
    ]
    assert (found.damaged, found.nameless, found.taken) == ({}, [], [])
    assert rescan(database, store).registered == []
    KeyStore(database).create("ops", Role.ADMIN)  # or else it would be open, which a server with keys never is again
    database.close()
    async with running(settings, "acme:manager", "ops:admin") as rig:
        rig.catalog.check_integrity()
        for name, who in OWNERS:
            after = (await rig.call("GET", f"/v1/adapters/{name}", who)).json()
            assert after["versions"] == before[name]["versions"]
            assert after["active_version"] == before[name]["active_version"]
        assert (await rig.push("x", sound_files(3.0), "acme:manager")).json()["version"] == 3


async def test_what_an_older_database_lacks_can_be_registered_in_it(
    settings: Settings, store_of: Callable[[], Store], tmp_path: Path
) -> None:
    async with running(settings) as rig:
        await rig.push("x")
        backup(settings, tmp_path / "old")
        await rig.push("x", sound_files(2.0))
        await rig.push("y", sound_files(3.0))
    restore(tmp_path / "old", settings)
    async with running(settings):
        assert len(store_of().orphans()) == 2
    database = open_database(settings.resolved_database_url)
    found = rescan(database, store_of())
    database.close()
    assert [(r.name, r.version) for r in found.registered] == [("x", 2), ("y", 1)]
    async with running(settings) as rig:
        assert served(rig, "x") == sound_files()  # what was active stays so
        assert served(rig, "y") == sound_files(3.0)
        assert store_of().orphans() == []
        rig.catalog.check_integrity()


async def test_a_number_that_is_another_version_by_now_is_left_out(
    settings: Settings, store_of: Callable[[], Store], tmp_path: Path
) -> None:
    async with running(settings) as rig:
        await rig.push("x")
        backup(settings, tmp_path / "old")
        await rig.push("x", sound_files(2.0))
    restore(tmp_path / "old", settings)
    async with running(settings) as rig:
        await rig.push("x", sound_files(3.0), activate="true")
    database = open_database(settings.resolved_database_url)
    found = rescan(database, store_of())
    database.close()
    assert (found.registered, [(r.name, r.version) for r in found.taken]) == ([], [("x", 2)])
    async with running(settings) as rig:
        assert served(rig, "x") == sound_files(3.0)
        assert len(store_of().orphans()) == 1  # and is kept


async def test_files_without_a_label_are_registered_for_whom_one_says(
    settings: Settings, store_of: Callable[[], Store]
) -> None:
    await upload_two(settings)
    lose_database(settings)
    for name in store_of().names(labels.FOLDER):
        store_of().erase(f"{labels.FOLDER}/{name}")
    database, store = open_database(settings.resolved_database_url), store_of()
    owner = owner_of(store)
    found = rescan(database, store)
    assert (found.registered, len(found.nameless), found.is_claimed) == ([], 2, False)
    assert owner_of(store) == owner != registry_id(database)
    rules = Rules(MODULES, 64, 2**22)
    unnamed = Unnamed(
        "acme", signature_of(MODULES), lambda folder, blob: new_version(folder, rules.read(folder), None, blob=blob)
    )
    names = sorted(label.name for label in rescan(database, store, unnamed).registered)
    assert names == sorted(f"recovered-{blob[:12]}" for blob in store.blobs())
    database.close()
    async with running(settings) as rig:
        ref = rig.catalog.directory.resolve("acme", names[0])
        assert files_of(rig.catalog.local_folder(ref)) in (sound_files(), sound_files(2.0))


async def test_damaged_files_are_not_registered(settings: Settings, store_of: Callable[[], Store]) -> None:
    await upload_two(settings)
    lose_database(settings)
    blob = min(store_of().blobs())
    store_of().write(f"{blob[:2]}/{blob}/{ADAPTER_FILES[1]}", b"other")
    database = open_database(settings.resolved_database_url)
    found = rescan(database, store_of())
    database.close()
    assert (len(found.registered), list(found.damaged)) == (1, [blob])


async def test_a_registry_with_adapters_takes_a_store_over_on_a_word_only(
    settings: Settings, store_of: Callable[[], Store], tmp_path: Path
) -> None:
    await upload_two(settings)
    other = Settings(data_dir=tmp_path / "elsewhere")
    async with running(other) as rig:
        await rig.push("z", sound_files(3.0))
    database = open_database(other.resolved_database_url)
    with pytest.raises(StartupError, match="--take-over"):
        rescan(database, store_of())
    assert len(rescan(database, store_of(), take_over=True).registered) == 2
    assert belonging.owner_of(store_of()) == belonging.registry_id(database)
    database.close()


async def test_labels_of_versions_from_before_there_were_any_are_written(
    settings: Settings, store_of: Callable[[], Store]
) -> None:
    await upload_two(settings)
    names = store_of().names(labels.FOLDER)
    for name in names:
        store_of().erase(f"{labels.FOLDER}/{name}")
    async with running(settings) as rig:
        assert rig.catalog._labelling is not None
        await rig.catalog._labelling
        assert store_of().names(labels.FOLDER) == names


async def test_a_label_cut_short_counts_as_none(settings: Settings, store_of: Callable[[], Store]) -> None:
    await upload_two(settings)
    first, second = sorted(store_of().names(labels.FOLDER))
    data = store_of().read(f"{labels.FOLDER}/{first}")
    assert data is not None
    store_of().write(f"{labels.FOLDER}/{first}", data[:100])
    store_of().write(f"{labels.FOLDER}/{second}.tmp", data)
    assert [label.file for label in labels.all_labels(store_of())] == [f"{labels.FOLDER}/{second}"]


async def test_a_store_older_than_its_database_says_what_is_missing_and_is_mended(
    settings: Settings, store_of: Callable[[], Store], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await upload_two(settings)
    copies = tmp_path / "copies"
    write_sound(copies / "deep" / "inside", 2.0)
    (lost,) = [blob for blob in store_of().blobs() if blob == blob_of(copies / "deep" / "inside")]
    store_of().remove(lost)
    with caplog.at_level(logging.ERROR):
        async with running(settings) as rig:
            with pytest.raises(AdapterLoadFailed, match="missing"):
                served(rig, "y")
    assert "lacks the files of 1 adapters" in caplog.text
    database = open_database(settings.resolved_database_url)
    assert [c.is_mended for c in verify(database, store_of()) if c.fault] == [False]
    assert [c.is_mended for c in verify(database, store_of(), copies) if c.fault] == [True]
    assert [c.labels for c in verify(database, store_of()) if c.fault] == []
    database.close()
    async with running(settings) as rig:
        assert served(rig, "y") == sound_files(2.0)


def test_a_base_is_the_same_whatever_else_of_it_adapters_may_touch_in_a_later_version() -> None:
    more = {
        "norm": ModuleSpec("norm", "norm", 64, 64),
        "gate": ModuleSpec("gate", "linear", 64, 4, is_parameter=True),
        "experts.down_proj": ModuleSpec("experts.down_proj", "experts", 32, 64, is_parameter=True, num_experts=4),
    }
    other = {**MODULES, "other": ModuleSpec("other", "linear", 64, 64)}
    now = signature_of({**MODULES, **more})
    assert now.value == signature_of(MODULES).value != signature_of(other).value
    assert now.former == (with_norms({**MODULES, **more}),)
    assert now.fits(now.former[0])
    assert not now.fits(signature_of(other).value)


def with_norms(modules: dict[str, ModuleSpec]) -> str:
    """The signature as one version of the server made it, for which folders of that time have their adapters."""
    own = [module for module in modules.values() if not module.is_parameter]
    lines = sorted(f"{m.path} {m.kind} {m.in_features} {m.out_features}" for m in own)
    return sha256("\n".join(lines).encode()).hexdigest()
