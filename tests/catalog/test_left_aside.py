"""A Trainer's folder is taken however it comes: two files are read, one warning names the rest, no pickle is opened."""

import gzip
import io
import logging
import pickle
import tarfile
import zipfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from manylora.catalog.archive import unpack
from manylora.catalog.upload import Rules
from manylora.cli.main import build
from manylora.identity import ADAPTER_FILES, CONFIG_FILE, TENSOR_FILE
from manylora.settings import Settings
from tests.tiny_adapters import make_adapter

from .rig import MODULES, Rig, running, sound_files, tar_of

pytestmark = pytest.mark.anyio


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def trainers_files(marker: Path) -> dict[str, bytes]:
    """What `Trainer.save_model` and its checkpoints leave, by name; whoever opens a pickle makes `marker`."""
    bomb = pickle.dumps(_Bomb(marker))
    beside = {
        "README.md": b"# A card",
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        "special_tokens_map.json": b"{}",
        "chat_template.jinja": b"x",
        "trainer_state.json": b"{}",
        "training_args.bin": bomb,
        "optimizer.pt": bomb,
        "scheduler.pt": bomb,
        "rng_state.pth": bomb,
        "adapter_model.bin": bomb,
        "run.py": b"raise SystemExit",
        "runs/Nov29_host/events.out.tfevents.1": b"x",
    }
    checkpoint = {f"checkpoint-50/{name}": data for name, data in {**sound_files(3.0), "optimizer.pt": bomb}.items()}
    return {**sound_files(), **beside, **checkpoint}


NAMED = (
    "adapter_model.bin",
    "chat_template.jinja",
    "checkpoint-50/",
    "optimizer.pt",
    "rng_state.pth",
    "run.py",
    "runs/",
)


def check_warning(warnings: list[str]) -> None:
    [warning] = [text for text in warnings if "eft aside" in text]
    assert all(f"'{name}'" in warning for name in NAMED)
    assert "and 3 more" in warning
    assert "README" not in warning
    assert "tokenizer" in warning


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def zip_of(files: dict[str, bytes], prefix: str = "") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as bundle:
        for name, data in files.items():
            bundle.writestr(prefix + name, data)
    return out.getvalue()


Way = Callable[[Rig, Path, dict[str, bytes]], Awaitable[Any]]


async def _form(rig: Rig, _folder: Path, files: dict[str, bytes]) -> Any:
    return await rig.push("x", files)


async def _zip(rig: Rig, _folder: Path, files: dict[str, bytes]) -> Any:
    return await rig.push_archive("x", zip_of(files))


async def _zip_of_a_folder(rig: Rig, _folder: Path, files: dict[str, bytes]) -> Any:
    return await rig.push_archive("x", zip_of({**files, "checkpoint-50/": b""}, "out/"))


async def _zip_of_a_mac(rig: Rig, _folder: Path, files: dict[str, bytes]) -> Any:
    return await rig.push_archive("x", zip_of({f"out/{n}": d for n, d in files.items()} | {"__MACOSX/out/._x": b"x"}))


async def _tar(rig: Rig, _folder: Path, files: dict[str, bytes]) -> Any:
    return await rig.push_archive("x", tar_of(files, prefix="out/"))


async def _tar_of_dot(rig: Rig, folder: Path, _files: dict[str, bytes]) -> Any:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        tar.add(folder, arcname="./")  # as `tar -czf x.tgz -C FOLDER .` names its members
    assert b"./" in gzip.decompress(out.getvalue())
    return await rig.push_archive("x", out.getvalue())


async def _zip_of_dot(rig: Rig, _folder: Path, files: dict[str, bytes]) -> Any:
    return await rig.push_archive("x", zip_of({"": b"", **files}, "./"))


async def _import(rig: Rig, folder: Path, _files: dict[str, bytes]) -> Any:
    return await rig.call("POST", "/v1/adapters", json={"name": "x", "source": f"file://{folder}"})


WAYS: list[Way] = [_form, _zip, _zip_of_a_folder, _zip_of_dot, _tar, _tar_of_dot, _import]


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "trained" / "x", trainers_files(tmp_path / "opened"))


@pytest.mark.parametrize("way", WAYS)
async def test_it_is_taken_with_one_warning(way: Way, trained: Path, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", max_adapter_size=4 * 2**20, import_allow=[f"file://{tmp_path}"])
    async with running(settings) as rig:
        response = await way(rig, trained, trainers_files(tmp_path / "opened"))

        assert response.status_code == 201, response.text
        check_warning(response.json()["report"]["warnings"])
        assert [adapter.digest for _, adapter in rig.engine.probed] == [response.json()["digest"]]
        assert {Path(name).name for name in rig.stored()} == {CONFIG_FILE, TENSOR_FILE}
    assert not (tmp_path / "opened").exists()


async def test_what_a_mac_adds_is_left_aside(settings: Settings, tmp_path: Path) -> None:
    async with running(settings) as rig:
        response = await _zip_of_a_mac(rig, tmp_path, sound_files())

        assert response.status_code == 201, response.text
        assert "'__MACOSX/'" in response.json()["report"]["warnings"][0]


async def test_at_start_it_is_one_adapter_and_its_checkpoints_are_none(
    settings: Settings, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(trained.parent / "checkpoint-7", sound_files(5.0))  # alone, it is an adapter like others
    caplog.set_level(logging.WARNING)
    async with running(settings) as rig:
        done = await rig.catalog.register_folder(trained.parent)

        assert sorted(published.adapter.name for published in done) == ["checkpoint-7", "x"]
    check_warning([record.getMessage() for record in caplog.records])


def test_offline_it_is_read_alike(trained: Path, tmp_path: Path) -> None:
    rules = Rules(MODULES, 64, 2**22)
    archive = tmp_path / "x.zip"
    archive.write_bytes(zip_of(trainers_files(tmp_path / "opened"), "x/"))
    (tmp_path / "out").mkdir()

    others = unpack(archive, tmp_path / "out", max_bytes=2**22)

    for adapter in (rules.read(trained), rules.read(tmp_path / "out", others)):
        check_warning(adapter.warnings)
    # A template is unpacked, since defaults may name it, and said to be left aside where none do. A card is kept, and
    # what a tokenizer adds.
    unpacked = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert unpacked == sorted(
        ["README.md", *ADAPTER_FILES, "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    )
    assert not (tmp_path / "opened").exists()


def test_the_command_takes_it(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folder = make_adapter(tiny_llama_dir, tmp_path / "x")
    write_folder(folder, {"optimizer.pt": b"x", "checkpoint-50/adapter_config.json": b"{}"})
    (tmp_path / "x.zip").write_bytes(zip_of({str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.*")}))

    for path in (folder, tmp_path / "x.zip"):
        result = CliRunner().invoke(build(), ["adapters", "validate", str(path), "--model", str(tiny_llama_dir)])

        assert result.exit_code == 0, result.output
        assert "Left aside" in result.output
        assert "'checkpoint-50/', 'optimizer.pt'" in " ".join(result.output.split())
