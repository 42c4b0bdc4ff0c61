"""`--adapters DIR`: what is found, what is skipped, what is refused."""

import logging
import shutil
from pathlib import Path

import pytest

from manylora.catalog import folders
from manylora.errors import StartupError
from manylora.settings import Settings

from .rig import TENSOR_FILE, running, sound_files, write_sound

pytestmark = pytest.mark.anyio


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    for number, name in enumerate(("billing", "nested/deeper/sql")):
        write_sound(folder / name, float(number + 1))
    return folder


async def test_every_peft_folder_is_registered_for_everybody_under_its_name(settings: Settings, root: Path) -> None:
    (root / "billing" / "optimizer.pt").write_bytes(b"not the adapter's")
    async with running(settings) as rig:
        done = await rig.catalog.register_folder(root)
        assert [(p.adapter.tenant, p.adapter.name) for p in done] == [("public", "billing"), ("public", "sql")]


async def test_an_unchanged_folder_costs_nothing_at_the_next_start(settings: Settings, root: Path) -> None:
    async with running(settings) as rig:
        await rig.catalog.register_folder(root)
    async with running(settings) as rig:
        assert await rig.catalog.register_folder(root) == []
        assert rig.engine.probed == []


async def test_a_changed_folder_is_the_next_version(settings: Settings, root: Path) -> None:
    async with running(settings) as rig:
        await rig.catalog.register_folder(root)
        write_sound(root / "billing", 7.0)
        (done,) = await rig.catalog.register_folder(root)
        assert (done.version.ref.label, done.adapter.active_version) == ("billing@2", 2)


async def test_a_folder_that_was_only_touched_is_no_new_version(settings: Settings, root: Path) -> None:
    async with running(settings) as rig:
        await rig.catalog.register_folder(root)
        (root / "billing" / TENSOR_FILE).touch()
        (done,) = await rig.catalog.register_folder(root)
        assert not done.is_new
        assert await rig.catalog.register_folder(root) == []


async def test_a_roll_back_survives_a_restart_with_an_unchanged_folder(settings: Settings, root: Path) -> None:
    async with running(settings) as rig:
        await rig.catalog.register_folder(root)
        write_sound(root / "billing", 7.0)
        await rig.catalog.register_folder(root)
        await rig.call("PATCH", "/v1/adapters/billing", json={"active_version": 1})
    async with running(settings) as rig:
        await rig.catalog.register_folder(root)
        assert rig.catalog.directory.resolve("public", "billing").version == 1


async def test_an_older_image_that_restarts_rolls_nobody_back(
    settings: Settings, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newer = tmp_path / "newer"
    write_sound(newer / "billing", 7.0)
    async with running(settings) as rig:
        await rig.catalog.register_folder(root)
        await rig.catalog.register_folder(newer)
        assert rig.catalog.directory.resolve("public", "billing").version == 2
    (root / "billing" / TENSOR_FILE).touch()  # as in a container that was made anew
    async with running(settings) as rig:
        await rig.catalog.register_folder(root)
        assert rig.catalog.directory.resolve("public", "billing").version == 2
        assert "manylora adapters promote billing@1" in caplog.text
        await rig.catalog.register_folder(newer)
        assert len((await rig.call("GET", "/v1/adapters/billing")).json()["versions"]) == 2
        await rig.call("PATCH", "/v1/adapters/billing", json={"active_version": 1})
        await rig.catalog.register_folder(newer)  # nor forward again
        assert rig.catalog.directory.resolve("public", "billing").version == 1


@pytest.mark.parametrize("change", ["touched", "moved", "rewritten"])
async def test_the_same_files_in_another_place_undo_no_decision(
    settings: Settings, root: Path, tmp_path: Path, change: str
) -> None:
    async with running(settings) as rig:
        await rig.catalog.register_folder(root)
        write_sound(root / "billing", 7.0)
        await rig.catalog.register_folder(root)
        await rig.call("PATCH", "/v1/adapters/billing", json={"active_version": 1, "pinned": True})
        if change == "touched":
            (root / "billing" / TENSOR_FILE).touch()
        elif change == "moved":
            root = root.rename(tmp_path / "elsewhere")
        else:
            shutil.rmtree(root / "billing")
            write_sound(root / "billing", 7.0)
        await rig.catalog.register_folder(root)
        shown = (await rig.call("GET", "/v1/adapters/billing")).json()
        assert (shown["active_version"], shown["pinned"], len(shown["versions"])) == (1, True, 2)


async def test_a_deleted_version_does_not_come_back_beside_a_newer_one(
    settings: Settings, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_sound(tmp_path / "newer" / "billing", 7.0)
    async with running(settings) as rig:
        await rig.catalog.register_folder(root)
        await rig.catalog.register_folder(tmp_path / "newer")
        await rig.call("DELETE", "/v1/adapters/billing/versions/1")
    async with running(settings) as rig:
        await rig.catalog.register_folder(root)
        assert rig.catalog.directory.resolve("public", "billing").version == 2
        assert "that version was deleted" in caplog.text


async def test_a_content_that_was_never_there_is_registered_whatever_was_uploaded_since(
    settings: Settings, root: Path
) -> None:
    async with running(settings) as rig:
        await rig.catalog.register_folder(root)
        await rig.push("billing", sound_files(5.0))
        write_sound(root / "billing", 9.0)
        (done,) = await rig.catalog.register_folder(root)
        assert (done.is_new, done.adapter.active_version) == (True, 3)


async def test_an_adapter_deleted_by_hand_comes_back_with_its_folder(settings: Settings, root: Path) -> None:
    async with running(settings) as rig:
        await rig.catalog.register_folder(root)
        await rig.call("DELETE", "/v1/adapters/sql")
        (done,) = await rig.catalog.register_folder(root)
        assert done.version.ref.label == "sql@2"


async def test_a_broken_folder_is_told_with_every_problem_and_the_others_are_served(
    settings: Settings, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_sound(root / "broken", r=0, kasa_config={"a": 1})
    pickled = write_sound(root / "pickled")
    (pickled / TENSOR_FILE).rename(pickled / "adapter_model.bin")
    write_sound(root / "Bad Name")
    async with running(settings) as rig:
        done = await rig.catalog.register_folder(root)
        assert {p.adapter.name for p in done} == {"billing", "sql"}
        for word in ("bad_config", "unsupported_feature", "not_safetensors", "'name' must be"):
            assert word in caplog.text
        await rig.assert_answers()


async def test_a_folder_that_broke_later_keeps_its_last_version(settings: Settings, root: Path) -> None:
    async with running(settings) as rig:
        await rig.catalog.register_folder(root)
        (root / "billing" / TENSOR_FILE).write_bytes(b"broken")
        assert await rig.catalog.register_folder(root) == []
        assert rig.catalog.directory.resolve("public", "billing").version == 1


async def test_two_folders_of_one_name_are_both_refused(
    settings: Settings, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_sound(root / "other" / "billing", 9.0)
    async with running(settings) as rig:
        done = await rig.catalog.register_folder(root)
        assert {p.adapter.name for p in done} == {"sql"}
        assert caplog.text.count("the same name") == 2


async def test_a_folder_that_does_not_exist_is_a_startup_error(settings: Settings, tmp_path: Path) -> None:
    async with running(settings) as rig:
        with pytest.raises(StartupError, match="not a folder"):
            await rig.catalog.register_folder(tmp_path / "nothing")


async def test_a_first_start_says_how_far_it_is(
    settings: Settings, root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(folders, "_TELL_EVERY", 1)
    with caplog.at_level(logging.INFO, folders.__name__):
        async with running(settings) as rig:
            await rig.catalog.register_folder(root)
            said = [record.getMessage() for record in caplog.records if record.name == folders.__name__]
            caplog.clear()
            await rig.catalog.register_folder(root)
    what = f"Looking at 2 new or changed folders below {root}: each is checked and tried on the base"
    assert said == [what, "Looked at 1 of 2 folders", "Looked at 2 of 2 folders"]
    assert [record for record in caplog.records if record.name == folders.__name__] == []
