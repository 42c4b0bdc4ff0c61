"""`kill -9` at random moments: afterwards every adapter is absent or whole, and what was promised is there."""

import asyncio
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from manylora.catalog.belonging import claim
from manylora.catalog.saved_mix import digest_of
from manylora.catalog.service import Catalog
from manylora.catalog.store import open_store
from manylora.catalog.verify import verify
from manylora.database.database import open_database
from manylora.lora.format import reader as lora_format
from manylora.settings import Settings

from .crash_child import NAMES, TENANT
from .rig import MODULES, TENSOR_FILE, CatalogEngine, running, sound_files

KILLS = 25
_ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def _forks(data_dir: Path, scratch: Path, life: str = "life") -> Iterator["subprocess.Popen[str]"]:
    """The process that makes those that are killed."""
    command = [sys.executable, "-m", "tests.catalog.crash_child", str(data_dir), str(scratch), life]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=_ROOT, text=True, env=_environment(), **pipes) as process:  # type: ignore[call-overload]
        assert json.loads(process.stdout.readline()) == {"ready": True}
        yield process
        process.stdin.close()


def _run_until_killed(forks: "subprocess.Popen[str]", seed: int) -> list[dict[str, Any]]:
    """Start a child, kill it a random while after a random number of operations, and give what it said."""
    assert forks.stdin is not None
    assert forks.stdout is not None
    forks.stdin.write(f"{seed}\n")
    forks.stdin.flush()
    said = [json.loads(forks.stdout.readline())]
    while not {"pid", "open"} <= {key for line in said for key in line}:
        said.append(json.loads(forks.stdout.readline()))
    chance = random.Random(seed)
    num_whole = chance.randint(0, 4)  # counted and not timed: on a busy machine they take as long as they take
    while sum("end" in line for line in said) < num_whole and "dead" not in said[-1]:
        said.append(_parsed(forks.stdout.readline()))
    time.sleep(chance.uniform(0.0, 0.3))
    os.kill(next(line["pid"] for line in said if "pid" in line), signal.SIGKILL)
    while "dead" not in said[-1]:
        said.append(_parsed(forks.stdout.readline()))
    return [line for line in said if line.keys() & {"begin", "end"}]


def _parsed(line: str) -> dict[str, Any]:
    """Nothing for a line that the kill cut in two."""
    try:
        parsed: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return parsed


def _environment() -> dict[str, str]:
    keep = {name: value for name, value in os.environ.items() if not name.startswith("MANYLORA_")}
    return {**keep, "PYTHONPATH": os.pathsep.join([str(_ROOT / "server"), str(_ROOT)]), "OMP_NUM_THREADS": "1"}


def _state(catalog: Catalog) -> dict[str, tuple[int | None, dict[int, str]]]:
    """By name: the active version, and each version's digest."""
    entries = {name: catalog.directory.own(TENANT, name) for name in NAMES}
    return {
        name: (entry.active_version, {number: v.ref.digest for number, v in entry.versions.items()})
        for name, entry in entries.items()
        if entry is not None
    }


async def _inspect(data_dir: Path) -> dict[str, tuple[int | None, dict[int, str]]]:
    """Start on what the kill left, and hold every adapter against its digest and the store against the registry."""
    catalog = Catalog.open(Settings(data_dir=data_dir), MODULES)
    try:
        await catalog.attach(CatalogEngine())
        catalog.check_integrity()
        blobs = set()
        for name in NAMES:
            entry = catalog.directory.own(TENANT, name)
            for listed in [] if entry is None else entry.versions.values():
                if listed.mix:
                    assert digest_of(listed.mix) == listed.ref.digest
                    assert catalog.directory.resolve(TENANT, name, listed.ref.version) == listed.ref, (
                        "its parts are there"
                    )
                    continue
                folder = catalog.local_folder(listed.ref)
                adapter = lora_format.read(folder, MODULES, max_rank=64, max_size=2**20)
                assert adapter.digest == listed.ref.digest
                blobs.add(listed.blob)
        store = data_dir / "store"
        assert {p.name for p in store.glob("??/*")} == blobs, "the store holds what is registered and nothing else"
        assert not list((store / "incoming").iterdir())
        assert not list((data_dir / "quarantine").iterdir())
        return _state(catalog)
    finally:
        await catalog.aclose()


def _check_promises(
    said: list[dict[str, Any]], highest: dict[str, int], state: dict[str, tuple[int | None, dict[int, str]]]
) -> None:
    """What the last finished operation on each name said must hold, unless a later one had begun."""
    last: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    for line in said:
        last[line["name"]].append(line)
        if line.get("end") in ("upload", "mix") and isinstance(line["result"], list):
            highest[line["name"]] = max(highest.get(line["name"], 0), line["result"][0])
    for name, lines in last.items():
        if not lines or "end" not in lines[-1]:
            continue
        end, begin = lines[-1], lines[-2]
        active, versions = state.get(name, (None, {}))
        if end["end"] in ("upload", "mix") and isinstance(end["result"], list):
            number, digest = end["result"]
            assert versions[number] == digest
            assert active == number
        elif end["end"] == "promote" and end["result"] is None:
            assert active == begin["version"]
        elif end["end"] == "rollback" and isinstance(end["result"], int):
            assert active == end["result"]
        elif end["end"] == "delete" and end["result"] is None:
            assert name not in state
        elif end["end"] == "delete version" and end["result"] is None:
            assert begin["version"] not in versions


@pytest.mark.slow
def test_kill_at_random_moments_leaves_every_adapter_absent_or_whole(tmp_path: Path) -> None:
    data_dir, scratch = tmp_path / "data", tmp_path / "scratch"
    scratch.mkdir()
    highest: dict[str, int] = {}
    num_operations = num_interrupted = 0
    with _forks(data_dir, scratch) as forks:
        for seed in range(KILLS):
            said = _run_until_killed(forks, seed)
            state = asyncio.run(_inspect(data_dir))
            _check_promises(said, highest, state)
            num_operations += len([line for line in said if "end" in line])
            num_interrupted += bool(said) and "begin" in said[-1]
    assert num_operations > KILLS
    assert num_interrupted > 0, "no kill hit an operation; the test shows nothing"
    assert max(highest.values()) > 1


async def _two_databases(data_dir: Path) -> dict[str, bytes]:
    """A store with four adapters, a database that knows one of them, and one that knows all; the bytes by blob."""
    settings = Settings(data_dir=data_dir, database_url=f"sqlite:///{data_dir}/newer.sqlite3")
    async with running(settings) as rig:
        for number in range(4):
            assert (await rig.push(f"a{number}", sound_files(number + 1.0))).status_code == 201
            if number == 0:
                with sqlite3.connect(data_dir / "newer.sqlite3") as database:
                    database.execute(f"VACUUM INTO '{data_dir}/older.sqlite3'")
                database.close()
    shutil.copytree(data_dir / "store", data_dir / "copies-of-store")
    (data_dir / "copies").mkdir()
    for folder in (data_dir / "copies-of-store").glob("??/*"):
        folder.rename(data_dir / "copies" / folder.name)
    return {folder.name: (folder / TENSOR_FILE).read_bytes() for folder in (data_dir / "copies").iterdir()}


def _give_back(settings: Settings) -> None:
    database = open_database(settings.resolved_database_url)
    store = open_store(settings.resolved_store_url, settings.data_dir / "cache")
    claim(store, database)
    store.close()
    database.close()


async def _assert_nothing_lost(data_dir: Path, expected: dict[str, bytes]) -> None:
    """The newer database serves all that it knows, but for what the kill left damaged, which can be mended.

    A rescan that was killed may have made the store that of the fresh database, which is meant to be so: it is given
    back.
    """
    settings = Settings(data_dir=data_dir, database_url=f"sqlite:///{data_dir}/newer.sqlite3")
    _give_back(settings)
    async with running(settings) as rig:
        assert rig.catalog._blobs.missing == frozenset()
        for checked in verify(rig.catalog.database, rig.catalog.store, data_dir / "copies"):
            assert checked.fault is None or checked.is_mended, checked
        found = {}
        for entry in rig.catalog.directory.entries():
            folder = rig.catalog.local_folder(entry.versions[1].ref)
            found[folder.name] = (folder / TENSOR_FILE).read_bytes()
        assert found == expected
        assert len(rig.catalog.store.names("labels")) == len(expected)
    assert not list((data_dir / "store" / "incoming").iterdir())


@pytest.mark.slow
def test_kill_while_files_are_set_aside_brought_back_registered_and_mended_loses_none(tmp_path: Path) -> None:
    data_dir, scratch = tmp_path / "data", tmp_path / "scratch"
    scratch.mkdir()
    expected = asyncio.run(_two_databases(data_dir))
    num_operations = num_interrupted = 0
    with _forks(data_dir, scratch, "restoring") as forks:
        for seed in range(KILLS):
            said = _run_until_killed(forks, seed)
            asyncio.run(_assert_nothing_lost(data_dir, expected))
            num_operations += len([line for line in said if "end" in line])
            num_interrupted += bool(said) and "begin" in said[-1]
    assert num_operations > KILLS / 2
    assert num_interrupted > 0, "no kill hit an operation; the test shows nothing"
