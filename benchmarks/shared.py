"""What servers that share a PostgreSQL database take to agree, and a large catalogue's start, refresh and pauses.

python -m benchmarks.shared --adapters 100000 --changes 200      # needs Debian's package postgresql

Two servers without a model answer over their real routes, in one process, from one database and one folder of files.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from itertools import count
from pathlib import Path

from benchmarks.catalogue import BASE, fill
from manylora.catalog.base_signature import BaseSignature
from manylora.catalog.registry import Registry
from manylora.database.database import open_database
from manylora.log import configure_logging
from manylora.settings import Settings
from tests.catalog import postgres
from tests.catalog.rig import Rig, running, sound_files

_PACE_S = 0.001


async def longest_pause(work: Callable[[], Awaitable[object]]) -> float:
    """The longest time, in seconds, that the event loop did not come round while the work was done."""
    longest, is_over = 0.0, asyncio.Event()

    async def watch() -> None:
        nonlocal longest
        last = time.perf_counter()
        while not is_over.is_set():
            await asyncio.sleep(_PACE_S)
            now = time.perf_counter()
            longest, last = max(longest, now - last - _PACE_S), now

    watching = asyncio.ensure_future(watch())
    await asyncio.sleep(0.05)
    longest = 0.0
    await work()
    is_over.set()
    await watching
    return longest


async def large_catalogue(url: str, num_adapters: int) -> None:
    database = open_database(url)
    fill(database, num_adapters)
    found: list[Registry] = []
    began = time.perf_counter()

    async def start() -> None:
        found.append(await asyncio.to_thread(Registry, database, BaseSignature(BASE)))

    pause = await longest_pause(start)
    print(
        f"start with {num_adapters} adapters: {time.perf_counter() - began:.1f} s, longest pause {pause * 1000:.0f} ms"
    )
    other = Registry(database, BaseSignature(BASE))
    seconds: list[float] = []
    pauses: list[float] = []
    for number in range(50):
        name = f"name-{number * 7}"
        tenant = f"tenant-{number * 7 % 500}"
        await asyncio.to_thread(partial(other.update, tenant, name, description=f"number {number}"))
        began = time.perf_counter()

        async def refresh() -> None:
            changes = await asyncio.to_thread(found[0].refresh)
            assert changes is not None

        pauses.append(await longest_pause(refresh))
        seconds.append(time.perf_counter() - began - 0.05)
    print(f"refresh after one change: {told(seconds)}; longest pause {max(pauses) * 1000:.0f} ms")
    database.close()


def told(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    at = {share: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.99)}
    return f"median {at[0.5] * 1000:.1f} ms, p99 {at[0.99] * 1000:.1f} ms"


async def answered_by(rig: Rig, model: str) -> str:
    """The version that answers, or the status of a refusal."""
    body = {"model": model, "prompt": "hi", "max_tokens": 1}
    answer = await rig.client.post("/v1/completions", json=body, headers=rig.headers("acme:manager"))
    assert answer.status_code in (200, 404), answer.text
    return str(answer.headers.get("x-manylora-adapter", answer.status_code))


async def until(rig: Rig, model: str, wanted: str) -> float:
    began = time.perf_counter()
    while await answered_by(rig, model) != wanted:
        await asyncio.sleep(0)
    return time.perf_counter() - began


async def agreeing(url: str, folder: Path, num_changes: int) -> None:
    """After each answer to a change on one server, how long until the other answers accordingly; no token is sent."""
    taken: dict[str, list[float]] = {"upload": [], "promote": [], "delete": []}
    seeds = count(1)
    async with AsyncExitStack() as stack:
        a, b = [
            await stack.enter_async_context(
                running(Settings(data_dir=folder / name, database_url=url, store_url=f"file://{folder}/store"))
            )
            for name in "ab"
        ]
        await a.make_keys("acme:manager")
        b.keys = a.keys
        while b.gate.is_open:
            await asyncio.sleep(0.01)
        for number in range(num_changes):
            here, there = (a, b) if number % 2 else (b, a)
            name = f"adapter-{number}"
            for _ in range(2):
                pushed = await here.push(name, sound_files(float(next(seeds))), "acme:manager", activate="true")
                assert pushed.status_code == 201, pushed.text
            taken["upload"].append(await until(there, name, f"{name}@2"))
            path = f"/v1/adapters/{name}"
            assert (await here.call("PATCH", path, "acme:manager", json={"active_version": 1})).status_code == 200
            taken["promote"].append(await until(there, name, f"{name}@1"))
            assert (await here.call("DELETE", path, "acme:manager")).status_code == 204
            taken["delete"].append(await until(there, name, "404"))
    for what, seconds in taken.items():
        print(f"{what} on one server, right on the other: {told(seconds)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--adapters", type=int, default=100_000)
    parser.add_argument("--changes", type=int, default=200)
    wanted = parser.parse_args()
    programs = postgres.programs()
    assert programs is not None, "PostgreSQL is not installed"
    configure_logging(level="warning", as_json=False)  # no line for each request
    with postgres.running(programs) as cluster, tempfile.TemporaryDirectory() as folder:
        asyncio.run(agreeing(cluster.new_database(), Path(folder), wanted.changes))
        asyncio.run(large_catalogue(cluster.new_database(), wanted.adapters))


if __name__ == "__main__":
    main()
