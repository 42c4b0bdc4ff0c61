"""A whole cluster on Ray Serve: `manylora cluster` with three replicas of a tiny model. `make cluster` runs these.

Ray is an extra of its own, not among what the other tests need.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.catalog import postgres
from tests.tiny_adapters import make_adapter

from .started import PATIENCE_S, Running, complete

pytestmark = [pytest.mark.ray, pytest.mark.anyio]
NUM_ADAPTERS, NUM_SLOTS, NUM_REPLICAS = 40, 15, 3


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def running(
    cluster: postgres.Cluster, tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    pytest.importorskip("ray")
    folder = tmp_path_factory.mktemp("cluster")
    for seed in range(NUM_ADAPTERS):
        make_adapter(tiny_llama_dir, folder / "adapters" / f"a{seed}", rank=4, seed=seed, strength=2.0)
    settings = {
        "served-name": "tiny", "adapters": folder / "adapters", "port": 0, "dtype": "float32", "num-threads": 1,
        "kv-cache-memory": "16MiB", "adapter-memory": "64MiB", "host-tier-memory": "64MiB", "max-slots": NUM_SLOTS,
        "max-num-seqs": 8, "data-dir": folder / "data", "database-url": cluster.new_database(),
        "store-url": f"file://{folder}/store", "replicas": NUM_REPLICAS,
    }  # fmt: skip
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    running = Running([str(tiny_llama_dir), *flags], folder / "log")
    try:
        yield running
    finally:
        running.end()


@pytest.fixture
async def client(running: Running) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=running.url, timeout=PATIENCE_S) as client:
        yield client


def replica_of(answer: httpx.Response) -> str:
    return answer.headers["x-manylora-replica"]


async def share_on_device(client: httpx.AsyncClient, *, is_blind: bool) -> float:
    """Of 400 requests for 40 adapters by Zipf, after 200 more, how many found theirs on the device.

    Blind: no two requests show the same key, which an open cluster does not look at, so that routers see 600 adapters.
    """
    weights = [(rank + 1) ** -0.6 for rank in range(NUM_ADAPTERS)]
    names = random.Random(1).choices([f"a{number}" for number in range(NUM_ADAPTERS)], weights, k=600)
    tiers: Counter[str] = Counter()
    at_a_time = asyncio.Semaphore(6)

    async def one(place: int, name: str) -> None:
        async with at_a_time:
            answer = await complete(client, name, key=f"{place}" if is_blind else "")
        assert answer.status_code == 200
        if place >= 200:
            tiers[answer.json()["manylora"]["load_tier"]] += 1

    await asyncio.gather(*(one(*each) for each in enumerate(names)))
    return tiers["device"] / tiers.total()


async def test_adapters_stay_where_they_are(client: httpx.AsyncClient) -> None:
    """40 adapters on three replicas of 15 slots: most requests find theirs on the device, by chance half at most."""
    blind = await share_on_device(client, is_blind=True)
    found: list[float] = []
    while not found or (found[-1] < 0.8 and len(found) < 10):  # until routers were told where adapters are
        found.append(await share_on_device(client, is_blind=False))

    assert found[-1] >= 0.8, (found, blind)
    assert blind <= 0.5, (found, blind)


async def test_a_hot_adapter_spreads(client: httpx.AsyncClient) -> None:
    answers = await asyncio.gather(*(complete(client, "a1", 60) for _ in range(48)))

    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
    assert len({replica_of(answer) for answer in answers}) == NUM_REPLICAS


async def test_a_client_that_leaves_frees_its_blocks(client: httpx.AsyncClient) -> None:
    body = {"model": "a2", "prompt": "The quick", "max_tokens": 450, "ignore_eos": True, "stream": True, "n": 8}
    before = await cancelled_before(client)
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        replica = replica_of(answer)
        async for _ in answer.aiter_lines():
            break

    async with asyncio.timeout(PATIENCE_S):
        while True:
            stats = await stats_of(client, replica)
            if not stats["running"] and cancelled_in(stats) > before[replica]:
                break
            await asyncio.sleep(0.05)
    assert stats["waiting"] == 0


async def test_an_upload_reaches_a_replica_in_pieces(client: httpx.AsyncClient) -> None:
    files = {"files": ("adapter_model.safetensors", bytes(10 * 2**20))}

    answered = await client.post("/v1/adapters", data={"name": "big"}, files=files)

    assert answered.status_code == 422
    assert "adapter_config.json" in answered.text


def cancelled_in(stats: dict[str, Any]) -> int:
    return int(stats["totals"]["outcomes"].get("cancelled", 0))


async def cancelled_before(client: httpx.AsyncClient) -> dict[str, int]:
    """By replica, how many requests were cancelled so far."""
    found: dict[str, int] = {}
    async with asyncio.timeout(PATIENCE_S):
        while len(found) < NUM_REPLICAS:
            answer = await client.get("/v1/stats")
            found[replica_of(answer)] = cancelled_in(answer.json())
    return found


async def stats_of(client: httpx.AsyncClient, replica: str) -> dict[str, Any]:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            answer = await client.get("/v1/stats")
            if replica_of(answer) == replica:
                found: dict[str, Any] = answer.json()
                return found


async def stream_to_its_end(client: httpx.AsyncClient, name: str, begun: asyncio.Event) -> tuple[str, list[str]]:
    """The replica that answered, and the events."""
    body = {"model": name, "prompt": "The quick", "max_tokens": 400, "ignore_eos": True, "stream": True}
    events = []
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
                begun.set()
        return replica_of(answer), events


async def test_kill_9_ends_the_streams_of_one_replica_and_nothing_else(
    running: Running, client: httpx.AsyncClient
) -> None:
    begun = [asyncio.Event() for _ in range(12)]
    streams = [
        asyncio.ensure_future(stream_to_its_end(client, f"a{number}", event)) for number, event in enumerate(begun)
    ]
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*(event.wait() for event in begun))
        victim = random.Random(1).choice(running.replicas())
        victim.send_signal(signal.SIGKILL)
        after = await asyncio.gather(*(complete(client, f"a{number}") for number in range(NUM_ADAPTERS)))
        ended = await asyncio.gather(*streams)

    assert {answer.status_code for answer in after} == {200}
    broken = {replica for replica, events in ended if events[-1] != "[DONE]"}
    assert len(broken) == 1
    for replica, events in ended:
        if replica in broken:
            assert json.loads(events[-1])["error"]["code"] == "replica_lost"
        else:
            assert events[-1] == "[DONE]"
    async with asyncio.timeout(PATIENCE_S):  # Serve starts another in its place
        while len([each for each in running.replicas() if each.pid != victim.pid]) < NUM_REPLICAS:
            await asyncio.sleep(0.2)


async def test_a_command_that_cannot_start_ray_says_so_in_one_line(running: Running, tmp_path: Path) -> None:
    """It joins none that runs, wherever one is named, and begins one of its own, in a folder that is none here."""
    (tmp_path / "file").write_text("")
    arguments = [*running.arguments, "--data-dir", str(tmp_path / "data")]
    ended = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "manylora", "cluster", *arguments],
        env={**os.environ, "RAY_TMPDIR": str(tmp_path / "file"), "RAY_ADDRESS": "127.0.0.1:1"},
        capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip

    assert ended.returncode == 1
    assert "Ray could not be started: " in ended.stderr
    assert "Traceback" not in ended.stderr


async def test_an_update_under_load_fails_nobody(running: Running, client: httpx.AsyncClient) -> None:
    """Every answer during it is the adapter's own, and afterwards others answer."""
    right = {name: (await complete(client, name)).json()["choices"][0]["text"] for name in ("a0", "a3", "a5")}
    before = {each.pid for each in running.replicas()}
    wrong: list[Any] = []
    is_over = asyncio.Event()
    count = 0

    async def ask(number: int) -> None:
        nonlocal count
        names = random.Random(number)
        while not is_over.is_set():
            name = names.choice(list(right))
            answer = await complete(client, name)
            count += 1
            if answer.status_code != 200 or answer.json()["choices"][0]["text"] != right[name]:
                wrong.append((answer.status_code, answer.text[:300]))

    asking = [asyncio.ensure_future(ask(number)) for number in range(6)]
    try:
        await asyncio.to_thread(running.update, "--max-queue", "1000")
        async with asyncio.timeout(PATIENCE_S):
            while before & {each.pid for each in running.replicas()}:
                await asyncio.sleep(0.2)
    finally:
        is_over.set()
        await asyncio.gather(*asking)

    assert wrong == []
    assert count > 0
