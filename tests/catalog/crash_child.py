"""The process that `test_crash` kills: a real catalog over a fake engine, changing things until it is dead.

Prints one JSON line before each operation (`begin`) and one after it (`end`), so that the parent knows what was
promised when the kill came. What takes long to import is imported once: a first process makes a new one, by a fork,
for each seed that it reads, says its process id (`pid`), and says when it is dead.
"""

import asyncio
import json
import os
import random
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from manylora.catalog.receive import ARCHIVE_PART
from manylora.catalog.records import Wish
from manylora.catalog.rescan import rescan
from manylora.catalog.service import Catalog
from manylora.catalog.store import open_store
from manylora.database.database import open_database
from manylora.errors import AdapterNotFound, Conflict, InvalidRequest
from manylora.identity import Mix
from manylora.settings import Settings

from .rig import MODULES, TENSOR_FILE, CatalogEngine, sound_files, tar_of

TENANT = "acme"
NAMES = ("a", "b", "c")
SEEDS = (1.0, 2.0, 3.0, 4.0)


def _say(**facts: Any) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


async def _body(name: str, seed: float) -> AsyncIterator[bytes]:
    yield b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\n' + name.encode() + b"\r\n"
    yield b'--b\r\nContent-Disposition: form-data; name="activate"\r\n\r\ntrue\r\n'
    yield f'--b\r\nContent-Disposition: form-data; name="{ARCHIVE_PART}"\r\n\r\n'.encode()
    yield tar_of(sound_files(seed)) + b"\r\n--b--\r\n"


async def _step(catalog: Catalog, chance: random.Random) -> None:
    name, seed = chance.choice(NAMES), chance.choice(SEEDS)
    entry = catalog.directory.own(TENANT, name)
    actions = ["upload", "mix", "promote", "rollback", "pin", "delete", "delete version", "canary"]
    action = chance.choices(actions, [6, 2, 2, 1, 1, 1, 1, 2])[0]
    versions = [] if entry is None else list(entry.versions)
    if action not in ("upload", "mix") and not versions:
        return
    number = chance.choice(versions) if versions else 0
    _say(begin=action, name=name, seed=seed, version=number)
    result: Any = None
    try:
        if action == "upload":
            done = await catalog.upload(TENANT, _body(name, seed), "multipart/form-data; boundary=b", None)
            result = [done.version.ref.version, done.version.ref.digest]
        elif action == "mix" and (mix := _mix(catalog, chance)).parts:
            done = await catalog.save_mix(Wish(TENANT, name, activate=True), mix)
            result = [done.version.ref.version, done.version.ref.digest]
        elif action == "promote":
            await catalog.update(TENANT, name, active_version=number)
        elif action == "rollback":
            result = (await catalog.rollback(TENANT, name)).active_version
        elif action == "canary":
            await catalog.canaries.begin(TENANT, name, number, share=0.5, until=None)
        elif action == "pin":
            await catalog.update(TENANT, name, pinned=chance.random() < 0.5)
        else:
            await catalog.delete(TENANT, name, number if action == "delete version" else None)
    except (Conflict, AdapterNotFound, InvalidRequest) as error:
        result = error.code
    _say(end=action, name=name, result=result)


def _mix(catalog: Catalog, chance: random.Random) -> Mix:
    """Of up to two versions with files, any that there are."""
    entries = [entry for name in NAMES if (entry := catalog.directory.own(TENANT, name)) is not None]
    refs = [listed.ref for entry in entries for listed in entry.versions.values() if not listed.mix]
    return Mix.weighted((ref, chance.choice((0.5, 1.0, -1.0))) for ref in chance.sample(refs, min(2, len(refs))))


async def main(data_dir: Path, seed: int) -> None:
    catalog = Catalog.open(Settings(data_dir=data_dir), MODULES)
    await catalog.attach(CatalogEngine())
    chance = random.Random(seed)
    _say(open=True)
    while True:
        await _step(catalog, chance)


async def restoring(data_dir: Path, seed: int) -> None:
    """Starts with an older and a newer database in turn, rescans and repairs: whatever moves files in the store."""
    chance = random.Random(seed)
    _say(open=True)
    while True:
        action = chance.choice(["older", "newer", "rescan", "mend"])
        _say(begin=action, name="")
        if action == "rescan":
            _rescan(data_dir)
        elif action == "mend":
            _mend(data_dir, chance)
        else:
            catalog = Catalog.open(_settings_with(data_dir, action), MODULES)
            await catalog.attach(CatalogEngine())
            await catalog.aclose()
        _say(end=action, name="")


def _settings_with(data_dir: Path, database: str) -> Settings:
    return Settings(data_dir=data_dir, database_url=f"sqlite:///{data_dir}/{database}.sqlite3")


def _rescan(data_dir: Path) -> None:
    for file in data_dir.glob("fresh.sqlite3*"):
        file.unlink()
    database = open_database(f"sqlite:///{data_dir}/fresh.sqlite3")
    store = open_store(f"file://{data_dir}/store", data_dir / "cache")
    owner = store.read("registry")
    rescan(database, store)
    assert owner is not None
    store.write("registry", owner)  # it stays the store of the other two
    store.close()
    database.close()


def _mend(data_dir: Path, chance: random.Random) -> None:
    """A file is damaged, and a copy of the adapter is there."""
    store = open_store(f"file://{data_dir}/store", data_dir / "cache")
    blobs = sorted(store.blobs())
    if blobs:
        blob = chance.choice(blobs)
        store.write(f"{blob[:2]}/{blob}/{TENSOR_FILE}", b"damaged")
        store.put(data_dir / "copies" / blob, blob)
    store.close()


LIVES = {"life": main, "restoring": restoring}


def _serve_forks(data_dir: Path, life: str) -> None:
    _say(ready=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            asyncio.run(LIVES[life](data_dir, int(line)))
        _say(pid=child)
        os.waitpid(child, 0)
        sys.stdout.write("\n")  # the dead one may have left half a line
        _say(dead=child)


if __name__ == "__main__":
    tempfile.tempdir = sys.argv[2]
    _serve_forks(Path(sys.argv[1]), sys.argv[3])
