"""`kill -9` of a real server under load, again and again: what it has acknowledged holds, and nothing is half done.

    python -m tests.e2e.kills --kills 100 --out kills.jsonl

A server on a tiny model serves 60 adapters over 16 slots to three tenants. Two of them change adapters of their own
(upload, promote, describe, delete a version, delete all) and ask for answers all the time; one leaves before its
answers are whole; some requests are refused. At a random moment, sometimes again while it starts, the server is killed
and started on what is left. Then

- each adapter is as its last acknowledged change left it, or as the one that was under way would have left it;
- each version's files are, byte for byte, those that were uploaded, and it answers as it did before;
- each tenant is charged for every whole answer it got, and besides at most for those that were under way, with just as
  many tokens as those have;
- nothing is left of what was cut off.
"""

import argparse
import asyncio
import io
import json
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

from manylora.database.database import open_database
from manylora.settings import load_settings
from manylora.tenants.interface import Role
from manylora.tenants.keys import KeyStore
from manylora_loadtest.fleet import make_fleet
from tests.e2e.conftest import ROOT
from tests.e2e.kill_records import NUM_TOKENS, Adapter, Bill, Kill, State, sums_of
from tests.tiny_models import make_tiny_model

NUM_ADAPTERS = 60
NUM_SLOTS = 16
RANKS = (4, 8)
NUM_VARIANTS = 4
OWNERS = ("acme", "rival")
NAMES = ("one", "two", "three")
LEAVER = "leaver"
NUM_ASKING = 4  # clients of each tenant that wait for whole answers
QUESTION = {"prompt": "The quick brown fox", "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
LONGEST_LIFE_S = 4.0
LONGEST_START_S = 4.0
SHARE_KILLED_AT_START = 0.15
PATIENCE_S = 300.0
FILES = ("adapter_config.json", "adapter_model.safetensors")
ENDS = (httpx.HTTPError, OSError)


def start(settings: Mapping[str, Any], stderr: Path) -> "subprocess.Popen[str]":
    """A server in a new interpreter, which starts: to be killed while it does is part of the story."""
    with stderr.open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.serve_once", json.dumps(settings)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )


class Story:
    """A data folder through many lives of its server."""

    def __init__(self, folder: Path, model: Path, seed: int) -> None:
        self.folder = folder
        self.chance = random.Random(seed)
        self.fleet = make_fleet(model, folder / "fleet", NUM_ADAPTERS, RANKS, b_scale=0.3)
        variants = make_fleet(model, folder / "variants", NUM_VARIANTS, RANKS, pattern="v{}", seed=2, b_scale=0.3)
        self.variants = [{name: (v / name).read_bytes() for name in FILES} for v in variants]
        self.settings: dict[str, Any] = {
            "model": str(model), "served_name": "tiny", "port": 0, "dtype": "float32", "kv_cache_memory": "4MiB",
            "adapter_memory": "64MiB", "host_tier_memory": "64MiB", "num_threads": 1, "max_slots": NUM_SLOTS,
            "data_dir": str(folder / "data"),
        }  # fmt: skip
        self.keys = self._make_keys()
        self.adapters = {tenant: [Adapter(name) for name in NAMES] for tenant in OWNERS}
        self.bills = {tenant: Bill() for tenant in OWNERS}
        self.digests: list[str] = []  # of each variant
        self.texts: dict[str, str] = {}  # by digest of an adapter; "" for the base
        self.prompt_tokens = self.probe_tokens = 0
        self.is_killed = False

    def _make_keys(self) -> dict[str, str]:
        database = open_database(load_settings(data_dir=self.folder / "data").resolved_database_url)
        roles = {**dict.fromkeys(OWNERS, Role.MANAGER), LEAVER: Role.USER, "ops": Role.ADMIN}
        try:
            return {tenant: KeyStore(database).create(tenant, role)[1] for tenant, role in roles.items()}
        finally:
            database.close()

    @contextmanager
    def server(self, **changes: Any) -> Iterator[tuple["subprocess.Popen[str]", str]]:
        """A server that answers, and its address; killed at the end."""
        log = self.folder / "server.log"
        process = start({**self.settings, **changes}, log)
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line, log.read_text()
            yield process, json.loads(line)["url"]
        finally:
            process.kill()
            process.wait()
            process.stdout.close()

    def client(self, url: str, tenant: str) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {self.keys[tenant]}"}
        return httpx.AsyncClient(base_url=url, headers=headers, timeout=PATIENCE_S)

    # the first life

    async def begin(self, url: str) -> None:
        """Learn what every adapter answers, and each variant's digest."""
        async with self.client(url, "ops") as ops:
            names = [folder.name for folder in self.fleet]
            for name in ["tiny", *names]:
                answer = await _answer(ops, name)
                self.texts[_digest(answer)] = _text(answer)
                self.prompt_tokens = answer["usage"]["prompt_tokens"]
            for number in range(NUM_VARIANTS):
                version = (await self._send_upload(ops, "rehearsal", number)).json()
                self.digests.append(version["digest"])
                self.probe_tokens = 2 * version["report"]["effect"]["prompt_tokens"]
                self.texts[version["digest"]] = _text(await _answer(ops, "rehearsal"))
            _expect(await ops.delete("/v1/adapters/rehearsal"), 204)
        assert len(set(self.texts.values())) > NUM_ADAPTERS // 2, "most adapters answer alike: this would show little"

    # a life under load

    async def live(self, url: str, process: "subprocess.Popen[str]", kill: Kill) -> None:
        """Everything at once until the server is killed."""
        self.is_killed = False
        clients = {tenant: self.client(url, tenant) for tenant in (*OWNERS, LEAVER)}
        tasks: list[Awaitable[None]] = [self._leave(clients[LEAVER], kill), self._end(process, kill.after_s)]
        for tenant in OWNERS:
            client = clients[tenant]
            tasks += [self._change(client, tenant, adapter, kill) for adapter in self.adapters[tenant]]
            tasks += [self._ask_on(client, tenant, kill) for _ in range(NUM_ASKING)]
            tasks.append(self._be_refused(client, tenant, kill))
        try:
            await asyncio.gather(*tasks)
        finally:
            for client in clients.values():
                await client.aclose()

    async def _end(self, process: "subprocess.Popen[str]", after_s: float) -> None:
        await asyncio.sleep(after_s)
        self.is_killed = True
        process.send_signal(signal.SIGKILL)

    async def _until_killed(self, step: Callable[[], Awaitable[None]]) -> None:
        while not self.is_killed:
            try:
                await step()
            except ENDS:
                assert self.is_killed, "the connection broke before the kill"

    async def _change(self, client: httpx.AsyncClient, tenant: str, adapter: Adapter, kill: Kill) -> None:
        async def step() -> None:
            await self._change_once(client, adapter, self.bills[tenant])
            kill.changes += 1
            if adapter.state.active is not None:
                await self._ask(client, tenant, adapter.name, adapter.state.versions[adapter.state.active])

        await self._until_killed(step)

    async def _change_once(self, client: httpx.AsyncClient, adapter: Adapter, bill: Bill) -> None:
        state, chance = adapter.state, self.chance
        others = [number for number in state.versions if number != state.active]
        kinds = ["upload", "upload", *(["promote", "describe", "delete"] if state.versions else [])]
        kind = chance.choice([*kinds, *(["promote", "promote", "delete version"] if others else [])])
        if kind == "upload":
            await self._upload(client, adapter, bill)
        elif kind == "promote":
            number = chance.choice(list(state.versions))
            wanted = State(state.versions, number, state.description)
            await self._patch(client, adapter, "promote", {"active_version": number}, wanted)
        elif kind == "describe":
            text = f"text {chance.random()}"
            wanted = State(state.versions, state.active, text)
            await self._patch(client, adapter, "describe", {"description": text}, wanted)
        elif kind == "delete":
            await self._delete(client, adapter, f"/v1/adapters/{adapter.name}", State())
        else:
            number = chance.choice(others)
            await self._delete(client, adapter, f"/v1/adapters/{adapter.name}/versions/{number}", state.without(number))

    async def _upload(self, client: httpx.AsyncClient, adapter: Adapter, bill: Bill) -> None:
        state = adapter.state
        newest = state.versions[max(state.versions)] if state.versions else None
        variant = self.chance.choice([i for i, digest in enumerate(self.digests) if digest != newest])
        digest = self.digests[variant]

        def is_applied(found: State) -> bool:
            added = found.versions.keys() - state.versions.keys()
            if len(added) != 1 or (number := added.pop()) <= adapter.highest:
                return False
            return found == State({**state.versions, number: digest}, number, state.description)

        adapter.pending, adapter.is_applied = "upload", is_applied
        bill.probing += 1
        answer = await self._send_upload(client, adapter.name, variant)
        bill.probing, bill.probes = bill.probing - 1, bill.probes + 1
        version = answer.json()
        assert (version["digest"], version["version"] > adapter.highest) == (digest, True), version
        adapter.note(State({**state.versions, version["version"]: digest}, version["version"], state.description))
        adapter.pending = ""

    async def _send_upload(self, client: httpx.AsyncClient, name: str, variant: int) -> httpx.Response:
        parts = [("files", (file, data)) for file, data in self.variants[variant].items()]
        return _expect(await client.post("/v1/adapters", data={"name": name, "activate": "true"}, files=parts), 201)

    async def _patch(
        self, client: httpx.AsyncClient, adapter: Adapter, what: str, body: dict[str, Any], wanted: State
    ) -> None:
        adapter.pending, adapter.is_applied = what, wanted.__eq__
        _expect(await client.patch(f"/v1/adapters/{adapter.name}", json=body), 200)
        adapter.state, adapter.pending = wanted, ""

    async def _delete(self, client: httpx.AsyncClient, adapter: Adapter, path: str, wanted: State) -> None:
        adapter.pending, adapter.is_applied = "delete", wanted.__eq__
        _expect(await client.delete(path), 204)
        adapter.state, adapter.pending = wanted, ""

    async def _ask_on(self, client: httpx.AsyncClient, tenant: str, kill: Kill) -> None:
        async def step() -> None:
            name = self.chance.choice(["tiny", *(folder.name for folder in self.fleet)])
            await self._ask(client, tenant, name, None)
            kill.answers += 1

        await self._until_killed(step)

    async def _ask(self, client: httpx.AsyncClient, tenant: str, name: str, digest: str | None) -> None:
        """One whole answer, from the version that was to be asked, and the same text as ever."""
        bill = self.bills[tenant]
        bill.asked += 1
        answer = await (_streamed if self.chance.random() < 0.5 else _answer)(client, name)
        bill.asked -= 1
        bill.ok += 1
        found = _digest(answer)
        assert digest is None or found == digest, f"{name} was {digest}, answered by {found}"
        assert _text(answer) == self.texts[found], f"{name} ({found}) answered {_text(answer)!r}"

    async def _be_refused(self, client: httpx.AsyncClient, tenant: str, kill: Kill) -> None:
        bill = self.bills[tenant]

        async def step() -> None:
            bill.refusals += 1
            _expect(await client.post("/v1/completions", json={**QUESTION, "model": "tiny", "temperature": 99}), 400)
            bill.refusals -= 1
            bill.invalid += 1
            kill.refusals += 1
            await asyncio.sleep(0.05)

        await self._until_killed(step)

    async def _leave(self, client: httpx.AsyncClient, kill: Kill) -> None:
        async def step() -> None:
            body = {**QUESTION, "model": self.chance.choice(self.fleet).name, "max_tokens": 100, "stream": True}
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.aiter_lines()
                for _ in range(self.chance.randrange(4)):
                    await anext(lines)
            kill.left += 1

        await self._until_killed(step)

    # after a kill

    async def check(self, url: str, kill: Kill) -> None:
        """Hold what is there against what was promised."""
        async with self.client(url, "ops") as ops:
            usage = _expect(await ops.get("/v1/usage", params={"group_by": "tenant"}), 200).json()
            rows = {row["tenant"]: row for row in usage["data"]}
            nothing = {"outcomes": {}, "prompt_tokens": 0, "completion_tokens": 0}
            for tenant, bill in self.bills.items():
                heard, kill.answers_under_way = bill.ok, kill.answers_under_way + bill.asked
                bill.settle(rows.get(tenant, nothing), self.prompt_tokens, self.probe_tokens)
                kill.answers_counted_unheard += bill.ok - heard
            answer = await _answer(ops, self.chance.choice(self.fleet).name)
            assert _text(answer) == self.texts[_digest(answer)]
        for tenant in OWNERS:
            async with self.client(url, tenant) as client:
                for adapter in self.adapters[tenant]:
                    await self._check_adapter(client, tenant, adapter, kill)
        data = self.folder / "data"
        leftovers = [*(data / "quarantine").iterdir(), *(data / "store" / "incoming").iterdir()]
        assert not leftovers, leftovers

    async def _check_adapter(self, client: httpx.AsyncClient, tenant: str, adapter: Adapter, kill: Kill) -> None:
        answer = await client.get(f"/v1/adapters/{adapter.name}", params={"tenant": tenant})
        found = State()
        if answer.status_code != 404:
            view = _expect(answer, 200).json()
            digests = {version["version"]: version["digest"] for version in view["versions"]}
            assert all(version["status"] == "ready" for version in view["versions"]), view
            found = State(digests, view["active_version"], view["description"])
        if outcome := adapter.settle(found):
            kill.under_way.append(outcome)
        for number, digest in found.versions.items():
            await self._check_files(client, f"/v1/adapters/{adapter.name}/versions/{number}/download", digest)
            await self._ask(client, tenant, f"{adapter.name}@{number}", digest)
            kill.versions_checked += 1
        name = adapter.name if found.versions else f"{adapter.name}@{adapter.highest or 1}"
        if found.versions:
            assert found.active is not None
            await self._ask(client, tenant, name, found.versions[found.active])
        else:
            _expect(await client.get(f"/v1/models/{name}"), 404)

    async def _check_files(self, client: httpx.AsyncClient, path: str, digest: str) -> None:
        archive = _expect(await client.get(path), 200).content
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            contents = {Path(m.name).name: file.read() for m in tar if (file := tar.extractfile(m)) is not None}
        sent = self.variants[self.digests.index(digest)]
        assert {name: contents[name] for name in FILES} == sent


def _expect(answer: httpx.Response, status: int) -> httpx.Response:
    assert answer.status_code == status, f"{answer.request.method} {answer.request.url}: {answer.text}"
    return answer


async def _answer(client: httpx.AsyncClient, model: str) -> dict[str, Any]:
    answer = _expect(await client.post("/v1/completions", json={**QUESTION, "model": model}), 200)
    found: dict[str, Any] = answer.json()
    return found


async def _streamed(client: httpx.AsyncClient, model: str) -> dict[str, Any]:
    """A streamed answer, put together as a whole one."""
    texts: list[str] = []
    last: dict[str, Any] = {}
    body = {**QUESTION, "model": model, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            await answer.aread()
            _expect(answer, 200)
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            last = json.loads(line[6:])
            assert "error" not in last, last
            texts += [choice["text"] for choice in last["choices"]]
    assert "manylora" in last, "the stream ended early"
    return {"choices": [{"text": "".join(texts)}], "manylora": last["manylora"]}


def _text(answer: dict[str, Any]) -> str:
    text: str = answer["choices"][0]["text"]
    return text


def _digest(answer: dict[str, Any]) -> str:
    adapter = answer["manylora"]["adapter"]
    return "" if adapter is None else str(adapter["digest"])


def run(folder: Path, model: Path, num_kills: int, *, seed: int = 0, say: Callable[[Kill], None]) -> list[Kill]:
    """Kill the server so many times; raises AssertionError where anything does not hold. `say` hears of each kill."""
    story = Story(folder, model, seed)
    with story.server(adapters=str(folder / "fleet")) as (process, url):
        asyncio.run(story.begin(url))
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    kills: list[Kill] = []
    for number in range(num_kills + 1):
        began = time.monotonic()
        with story.server() as (process, url):
            if kills:
                kills[-1].restart_s = round(time.monotonic() - began, 2)
                asyncio.run(story.check(url, kills[-1]))
                say(kills[-1])
            if number == num_kills:
                process.send_signal(signal.SIGTERM)
                assert process.wait(PATIENCE_S) == 0
                return kills
            kills.append(Kill(number, round(story.chance.uniform(0.0, LONGEST_LIFE_S), 3)))
            asyncio.run(story.live(url, process, kills[-1]))
            process.wait()
        if story.chance.random() < SHARE_KILLED_AT_START:
            kills[-1].killed_while_starting_after_s = _kill_at_start(story)
    return kills


def _kill_at_start(story: Story) -> float:
    """Start a server, and kill it before, or just after, it answers; says after how many seconds."""
    process = start(story.settings, story.folder / "server.log")
    after_s = round(story.chance.uniform(0.0, LONGEST_START_S), 3)
    time.sleep(after_s)
    process.kill()
    process.communicate()
    return after_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one for each kill and the sums")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, options.out.open("w", encoding="utf-8") as out:

        def write(facts: Mapping[str, Any]) -> None:
            out.write(json.dumps(facts) + "\n")
            out.flush()
            sys.stdout.write(json.dumps(facts) + "\n")
            sys.stdout.flush()

        folder = Path(scratch)
        model = make_tiny_model("llama", folder / "tiny-llama")
        kills = run(folder, model, options.kills, seed=options.seed, say=lambda kill: write(asdict(kill)))
        write({"sums": sums_of(kills)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
