"""`kill -9` at random moments: afterwards every adapter is absent or whole, and what was promised is there."""

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from manylora.catalog.service import Catalog
from manylora.lora import format as lora_format
from manylora.settings import Settings

from .crash_child import NAMES, TENANT
from .rig import MODULES, CatalogEngine

KILLS = 25
_ROOT = Path(__file__).resolve().parents[2]


def _run_until_killed(data_dir: Path, scratch: Path, seed: int) -> list[dict[str, Any]]:
    """Start the child, kill it after a random while, and give what it said."""
    command = [sys.executable, "-m", "tests.catalog.crash_child", str(data_dir), str(seed), str(scratch)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=_ROOT, text=True, env=_environment())
    assert child.stdout is not None
    lines = [child.stdout.readline()]
    assert json.loads(lines[0]) == {"ready": True}
    time.sleep(random.Random(seed).uniform(0.0, 0.6))
    child.kill()
    lines += child.stdout.readlines()
    child.stdout.close()
    child.wait()
    return [json.loads(line) for line in lines[1:] if line.endswith("\n")]


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
        if line.get("end") == "upload":
            highest[line["name"]] = max(highest.get(line["name"], 0), line["result"][0])
    for name, lines in last.items():
        if not lines or "end" not in lines[-1]:
            continue
        end, begin = lines[-1], lines[-2]
        active, versions = state.get(name, (None, {}))
        if end["end"] == "upload":
            number, digest = end["result"]
            assert versions[number] == digest
            assert active == number
        elif end["end"] == "promote":
            assert active == begin["version"]
        elif end["end"] == "delete":
            assert name not in state
        elif end["end"] == "delete version" and end["result"] is None:
            assert begin["version"] not in versions


@pytest.mark.slow
def test_kill_at_random_moments_leaves_every_adapter_absent_or_whole(tmp_path: Path) -> None:
    data_dir, scratch = tmp_path / "data", tmp_path / "scratch"
    scratch.mkdir()
    highest: dict[str, int] = {}
    num_operations = num_interrupted = 0
    for seed in range(KILLS):
        said = _run_until_killed(data_dir, scratch, seed)
        state = asyncio.run(_inspect(data_dir))
        _check_promises(said, highest, state)
        num_operations += len([line for line in said if "end" in line])
        num_interrupted += bool(said) and "begin" in said[-1]
    assert num_operations > KILLS
    assert num_interrupted > 0, "no kill hit an operation; the test shows nothing"
    assert max(highest.values()) > 1
