"""What is stored is what is served: damaged files are noticed at every read, and mended by whoever has the bytes."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from manylora.catalog.store import open_store
from manylora.catalog.verify import verify
from manylora.database.database import open_database
from manylora.errors import AdapterLoadFailed
from manylora.identity import ADAPTER_FILES
from manylora.settings import Settings

from .real_server import serving
from .rig import CONFIG_FILE, TENSOR_FILE, Rig, files_of, running, sound_files

Damage = Callable[[Path], None]


def _flip(folder: Path) -> None:
    file = folder / TENSOR_FILE
    data = bytearray(file.read_bytes())
    data[-5] ^= 0x40
    file.write_bytes(data)


def _flip_config(folder: Path) -> None:
    config = json.loads((folder / CONFIG_FILE).read_bytes())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] * 2}))


def _cut(folder: Path) -> None:
    file = folder / TENSOR_FILE
    file.write_bytes(file.read_bytes()[:-100])


def _empty(folder: Path) -> None:
    (folder / CONFIG_FILE).write_bytes(b"")


def _lose_file(folder: Path) -> None:
    (folder / TENSOR_FILE).unlink()


def _lose_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def _folder_for_file(folder: Path) -> None:
    (folder / TENSOR_FILE).unlink()
    (folder / TENSOR_FILE).mkdir()


def _pipe_for_file(folder: Path) -> None:
    (folder / CONFIG_FILE).unlink()
    os.mkfifo(folder / CONFIG_FILE)


def _link_to_itself(folder: Path) -> None:
    (folder / TENSOR_FILE).unlink()
    (folder / TENSOR_FILE).symlink_to(TENSOR_FILE)


def _file_for_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


ALL = (
    _flip, _flip_config, _cut, _empty, _lose_file, _lose_folder, _folder_for_file, _pipe_for_file, _link_to_itself,
    _file_for_folder,
)  # fmt: skip
anyio = pytest.mark.anyio


def blob_folder(data_dir: Path) -> Path:
    (folder,) = (data_dir / "store").glob("??/*")
    return folder


def damaged(rig: Rig) -> float | None:
    return rig.metrics.registry.get_sample_value("manylora_adapter_files_damaged_total")


def in_other_bytes() -> dict[str, bytes]:
    """The same content: the tensors are written with metadata, and the config with other white space."""
    files = sound_files()
    return {
        CONFIG_FILE: json.dumps(json.loads(files[CONFIG_FILE]), indent=7).encode(),
        TENSOR_FILE: save_tensors(load_tensors(files[TENSOR_FILE]), metadata={"format": "pt"}),
    }


@anyio
@pytest.mark.parametrize("damage", ALL)
async def test_damaged_files_are_noticed_and_the_same_upload_mends_them(settings: Settings, damage: Damage) -> None:
    async with running(settings) as rig:
        version = (await rig.push("x")).json()
        folder = blob_folder(settings.data_dir)
        damage(folder)
        ref = rig.catalog.directory.resolve("public", "x")
        with pytest.raises(AdapterLoadFailed, match="damaged"):
            rig.catalog.local_folder(ref)
        assert damaged(rig) == 1
        answer = await rig.call("GET", "/v1/adapters/x/versions/1/download")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "adapter_load_failed")
        again = await rig.push("x")
        assert (again.status_code, again.json()["id"]) == (200, version["id"])
        assert files_of(rig.catalog.local_folder(ref)) == sound_files()
        assert damaged(rig) == 2


@anyio
@pytest.mark.parametrize("damage", ALL)
async def test_another_tenants_first_upload_stores_sound_files(settings: Settings, damage: Damage) -> None:
    async with running(settings, "acme:manager", "rival:manager") as rig:
        await rig.push("x", who="acme:manager")
        damage(blob_folder(settings.data_dir))
        assert (await rig.push("mine", who="rival:manager")).status_code == 201
        for tenant, name in (("rival", "mine"), ("acme", "x")):
            assert files_of(rig.catalog.local_folder(rig.catalog.directory.resolve(tenant, name))) == sound_files()


@anyio
@pytest.mark.parametrize("damage", ALL)
async def test_the_same_content_in_other_bytes_mends_as_well(settings: Settings, damage: Damage) -> None:
    async with running(settings) as rig:
        version = (await rig.push("x")).json()
        await rig.push("also")
        damage(blob_folder(settings.data_dir))
        again = await rig.push("x", in_other_bytes())
        assert (again.status_code, again.json()["id"]) == (200, version["id"])
        for name in ("x", "also"):
            ref = rig.catalog.directory.resolve("public", name)
            assert files_of(rig.catalog.local_folder(ref)) == in_other_bytes()
        rig.catalog.check_integrity()
    async with running(settings) as rig:
        assert files_of(rig.catalog.local_folder(rig.catalog.directory.resolve("public", "x"))) == in_other_bytes()


@anyio
async def test_sound_files_are_left_alone_by_other_bytes(settings: Settings) -> None:
    async with running(settings) as rig:
        await rig.push("x")
        assert (await rig.push("x", in_other_bytes())).status_code == 200
        assert files_of(blob_folder(settings.data_dir)) == sound_files()


@anyio
@pytest.mark.parametrize("damage", ALL)
async def test_verify_finds_and_mends(settings: Settings, damage: Damage, tmp_path: Path) -> None:
    async with running(settings) as rig:
        await rig.push("x")
        await rig.push("z")
        shutil.copytree(settings.data_dir / "store", tmp_path / "backup" / "store")
        damage(blob_folder(settings.data_dir))
        database = open_database(settings.resolved_database_url)
        store = open_store(settings.resolved_store_url, tmp_path, is_exclusive=False)
        (found,) = verify(database, store)
        assert (found.labels, found.is_mended) == (("public/x@1", "public/z@1"), False)
        assert found.fault
        (found,) = verify(database, store, tmp_path / "backup")
        assert found.is_mended
        (found,) = verify(database, store)
        assert found.fault is None
        database.close()
        assert files_of(rig.catalog.local_folder(rig.catalog.directory.resolve("public", "x"))) == sound_files()


@anyio
async def test_files_lost_by_the_store_come_back_from_the_folder_of_adapters(
    settings: Settings, tmp_path: Path
) -> None:
    source = tmp_path / "adapters" / "x"
    source.mkdir(parents=True)
    for name, data in sound_files().items():
        (source / name).write_bytes(data)
    async with running(settings) as rig:
        await rig.catalog.register_folder(tmp_path / "adapters")
    shutil.rmtree(blob_folder(settings.data_dir))
    async with running(settings) as rig:
        await rig.catalog.register_folder(tmp_path / "adapters")
        assert files_of(rig.catalog.local_folder(rig.catalog.directory.resolve("public", "x"))) == sound_files()


@anyio
@pytest.mark.slow
async def test_a_damaged_copy_of_a_bucket_is_fetched_again(settings: Settings, s3: str) -> None:
    remote = settings.model_copy(update={"store_url": f"{s3}/store"})
    async with running(remote) as rig:
        await rig.push("x")
        folder = rig.catalog.local_folder(rig.catalog.directory.resolve("public", "x"))
        for damage in ALL:
            damage(folder)
            assert files_of(rig.catalog.local_folder(rig.catalog.directory.resolve("public", "x"))) == sound_files()
        assert damaged(rig) == 0


@pytest.mark.slow
def test_a_completion_never_comes_from_damaged_files(tiny_base: Path, tmp_path: Path) -> None:
    with serving(tiny_base, tmp_path) as server:
        assert server.push("x", sound_files()).status_code == 201
        expected = server.complete("x")
    for damage in (_flip, _cut, _lose_file, _lose_folder):
        damage(blob_folder(tmp_path / "data"))
        with serving(tiny_base, tmp_path) as server:
            body = {"model": "x", "prompt": "The quick brown fox", "max_tokens": 6, "temperature": 0}
            answer = server.client.post("/v1/completions", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "adapter_load_failed"), answer.text
            assert str(tmp_path) not in answer.text, "where the files lie is nothing for a tenant"
            metrics = server.client.get("/metrics").text
            assert "manylora_adapter_files_damaged_total 0.0" not in metrics
            assert server.push("x", sound_files()).status_code == 200
            assert server.complete("x") == expected
        assert "cannot be served" in (tmp_path / "log").read_text()
        assert {p.name for p in blob_folder(tmp_path / "data").iterdir()} == set(ADAPTER_FILES)
