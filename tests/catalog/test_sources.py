"""Imports: from folders, from S3 (a real server of moto), from a hub, all by the allow-list; vLLM's two routes."""

from pathlib import Path

import pytest

from manylora.catalog.sources import check_allowed, fetch
from manylora.errors import InvalidAdapter, InvalidRequest, PermissionDenied, TooLarge
from manylora.settings import Settings

from .rig import CONFIG_FILE, TENSOR_FILE, running, sound_files, write_sound


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("source", "entry"),
    [
        ("file:///srv/a", "file:///srv/a"),
        ("file:///srv/a/b", "file:///srv/a"),
        ("file:///srv/a/b", "file:///srv/a/"),
        ("hf://acme/lora", "hf://acme"),
        ("hf://acme/lora@v2", "hf://acme/lora"),
        ("hf://acme/lora", "hf://acme/*"),
        ("s3://bucket/team/x", "s3://bucket/*/x"),
    ],
)
def test_an_entry_covers_itself_and_what_lies_below(source: str, entry: str) -> None:
    check_allowed(source, ["hf://nobody", entry])


@pytest.mark.parametrize(
    ("source", "entry"),
    [
        ("file:///srv/ab", "file:///srv/a"),
        ("file:///srv", "file:///srv/a"),
        ("hf://acme-evil/lora", "hf://acme"),
        ("hf://acme/lora2", "hf://acme/lora"),
        ("s3://bucket2/x", "s3://bucket"),
        ("s3://other/x", "hf://*"),
    ],
)
def test_an_entry_covers_nothing_beside_it(source: str, entry: str) -> None:
    with pytest.raises(PermissionDenied):
        check_allowed(source, [entry])


def test_nothing_is_allowed_by_default(target: Path) -> None:
    write_sound(target.parent / "a")
    with pytest.raises(PermissionDenied):
        fetch(f"file://{target.parent}/a", target, allow=(), max_bytes=2**20)


@pytest.mark.parametrize(
    "source",
    ["", "x", "/srv/a", "http://host/a", "file://relative", "file:///a\0b", "hf://one", "hf://a/../b", "hf://a/b?c",
     "s3://", "s3://b/../c", "s3://b/*", "s3://UPPER/x"],
)  # fmt: skip
def test_what_is_no_source_is_an_invalid_request(target: Path, source: str) -> None:
    with pytest.raises(InvalidRequest):
        fetch(source, target, allow=("file:///", "hf://*", "s3://*"), max_bytes=2**20)


def test_a_folders_two_files_are_taken_and_nothing_else(tmp_path: Path, target: Path) -> None:
    folder = write_sound(tmp_path / "allowed" / "a")
    (folder / "optimizer.pt").write_bytes(b"x")
    fetch(f"file://{folder}", target, allow=(f"file://{tmp_path}/allowed",), max_bytes=2**20)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == sound_files()


def test_a_path_cannot_lead_out_of_the_allowed_folder(tmp_path: Path, target: Path) -> None:
    outside = write_sound(tmp_path / "outside")
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    (allowed / "link").symlink_to(outside)
    half = allowed / "half"
    half.mkdir()
    (half / CONFIG_FILE).symlink_to(outside / CONFIG_FILE)
    (half / TENSOR_FILE).write_bytes(b"")
    for source in (f"{allowed}/../outside", f"{allowed}/link", str(half)):
        with pytest.raises(PermissionDenied):
            fetch(f"file://{source}", target, allow=(f"file://{allowed}",), max_bytes=2**20)
    assert not list(target.iterdir())


def test_an_allowed_folder_may_itself_be_reached_by_a_link(tmp_path: Path, target: Path) -> None:
    write_sound(tmp_path / "real" / "a")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for entry in (f"file://{tmp_path}/link", f"file://{tmp_path}/link/*"):
        fetch(f"file://{tmp_path}/link/a", target, allow=(entry,), max_bytes=2**20)


def test_a_folder_without_an_adapter_says_what_is_missing(tmp_path: Path, target: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidAdapter) as caught:
        fetch(f"file://{tmp_path}/empty", target, allow=(f"file://{tmp_path}",), max_bytes=2**20)
    assert [(p.code, p.where) for p in caught.value.problems] == [
        ("missing_file", CONFIG_FILE),
        ("missing_file", TENSOR_FILE),
    ]


def test_a_source_over_the_limit_is_too_large(tmp_path: Path, target: Path) -> None:
    write_sound(tmp_path / "a")
    with pytest.raises(TooLarge):
        fetch(f"file://{tmp_path}/a", target, allow=(f"file://{tmp_path}",), max_bytes=100)


def _put(url: str, files: dict[str, bytes]) -> None:
    import s3fs

    filesystem = s3fs.S3FileSystem(skip_instance_cache=True)
    for name, data in files.items():
        filesystem.pipe_file(f"{url}/{name}", data)


def _keys(url: str) -> list[str]:
    import s3fs

    filesystem = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    found = filesystem.find(url.removeprefix("s3://"))
    return sorted(key for key in found if key.endswith((CONFIG_FILE, TENSOR_FILE)))


def test_a_bucket_gives_an_adapters_files(s3: str, target: Path) -> None:
    files = {**sound_files(), "README.md": b"x"}
    _put(f"{s3}/team/a", {**files, "notes.txt": b"x"})
    fetch(f"{s3}/team/a/", target, allow=(f"{s3}/team",), max_bytes=2**20)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == files


def test_a_bucket_without_an_adapter_says_so(s3: str, target: Path) -> None:
    with pytest.raises(InvalidAdapter):
        fetch(f"{s3}/nothing", target, allow=("s3://*",), max_bytes=2**20)


@pytest.mark.anyio
async def test_adapters_live_in_a_bucket_through_restart_and_deletion(s3: str, settings: Settings) -> None:
    remote = settings.model_copy(update={"store_url": f"{s3}/store"})
    async with running(remote) as rig:
        assert (await rig.push("x")).status_code == 201
        await rig.push("y")
        assert len(_keys(s3)) == 2
        assert rig.stored() == []
    async with running(remote) as rig:
        folder = rig.catalog.local_folder(rig.catalog.directory.resolve("public", "x"))
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == sound_files()
        assert (await rig.call("GET", "/v1/adapters/x/versions/1/download")).status_code == 200
        rig.catalog.check_integrity()
        await rig.call("DELETE", "/v1/adapters/x")
        await rig.settle()
        assert len(_keys(s3)) == 2
        await rig.call("DELETE", "/v1/adapters/y")
        await rig.settle()
        assert _keys(s3) == []
        assert rig.stored() == []


@pytest.mark.anyio
async def test_bytes_that_changed_in_the_bucket_are_not_served(s3: str, settings: Settings) -> None:
    remote = settings.model_copy(update={"store_url": f"{s3}/store"})
    async with running(remote) as rig:
        await rig.push("x")
        (key,) = (k for k in _keys(s3) if k.endswith(TENSOR_FILE))
        _put(f"s3://{key.rpartition('/')[0]}", {TENSOR_FILE: b"other"})
        answer = await rig.call("GET", "/v1/adapters/x/versions/1/download")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "adapter_load_failed")
        assert rig.stored() == []


@pytest.mark.anyio
async def test_json_imports_a_folder_for_an_admin(settings: Settings, tmp_path: Path) -> None:
    folder = write_sound(tmp_path / "srv" / "a")
    allowing = settings.model_copy(update={"import_allow": (f"file://{tmp_path}/srv",)})
    async with running(allowing) as rig:
        body = {"name": "x", "source": f"file://{folder}", "description": "from disk", "pinned": True}
        answer = await rig.call("POST", "/v1/adapters", json=body)
        assert (answer.status_code, answer.json()["pinned"]) == (201, True), answer.text
        assert (await rig.call("POST", "/v1/adapters", json=body)).status_code == 200
        refused = await rig.call("POST", "/v1/adapters", json={**body, "source": "file:///etc"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "source_not_allowed")
        unknown = await rig.call("POST", "/v1/adapters", json={**body, "colour": "red"})
        assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "colour")


@pytest.mark.anyio
async def test_vllms_routes_load_and_unload(settings: Settings, tmp_path: Path) -> None:
    folder = write_sound(tmp_path / "srv" / "a")
    allowing = settings.model_copy(update={"import_allow": (f"file://{tmp_path}/srv",)})
    async with running(allowing) as rig:
        body: dict[str, object] = {"lora_name": "x", "lora_path": str(folder)}
        loaded = await rig.call("POST", "/v1/load_lora_adapter", json=body)
        assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'x' added successfully.")
        again = await rig.call("POST", "/v1/load_lora_adapter", json=body)
        assert again.status_code == 400
        write_sound(folder, 2.0)
        in_place = await rig.call("POST", "/v1/load_lora_adapter", json={**body, "load_inplace": True})
        assert in_place.status_code == 200
        assert rig.catalog.directory.resolve("public", "x").version == 2
        outside = await rig.call("POST", "/v1/load_lora_adapter", json={"lora_name": "y", "lora_path": "/etc"})
        error = outside.json()["error"]
        assert (outside.status_code, error["code"], error["param"]) == (403, "source_not_allowed", "lora_path")
        assert "import_allow" in error["message"]
        for wrong, param in (({"lora_name": "Y!"}, "lora_name"), ({"lora_path": "srv/a"}, "lora_path"),
                             ({"lora_path": "ftp://a"}, "lora_path"), ({"lora_path": None}, "lora_path")):  # fmt: skip
            refused = await rig.call("POST", "/v1/load_lora_adapter", json={**body, "lora_name": "z", **wrong})
            error = refused.json()["error"]
            assert (refused.status_code, error["param"]) == (400, param), error
            assert f"'{param}'" in error["message"]
            assert "'source'" not in error["message"]
            assert "'name'" not in error["message"]
        unloaded = await rig.call("POST", "/v1/unload_lora_adapter", json={"lora_name": "x"})
        assert (unloaded.status_code, unloaded.text) == (200, "Success: LoRA adapter 'x' removed successfully.")
        assert (await rig.call("POST", "/v1/unload_lora_adapter", json={"lora_name": "x"})).status_code == 404
