"""Usage over real processes: what a restart and a kill leave of it, and the command that shows it."""

import asyncio
import csv
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from .conftest import Server, running

pytestmark = pytest.mark.slow
NAMES = ("tiny", "small", "middle", "large")
NUM_CLIENTS = 8


def usage(server: Server, **params: str) -> dict[str, Any]:
    answer = httpx.get(f"{server.url}/v1/usage", params=params, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def counters(server: Server) -> dict[str, Any]:
    """The metrics in the shape of a usage total."""
    found: dict[str, Any] = {"outcomes": {}, "prompt_tokens": 0, "completion_tokens": 0}
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            if sample.name == "manylora_requests_total" and sample.value:
                outcome = sample.labels["outcome"]
                found["outcomes"][outcome] = found["outcomes"].get(outcome, 0) + sample.value
            for name in ("prompt_tokens", "completion_tokens"):
                found[name] += sample.value if sample.name == f"manylora_{name}_total" else 0
    return found


def counts(total: dict[str, Any]) -> dict[str, Any]:
    return {name: total[name] for name in ("outcomes", "prompt_tokens", "completion_tokens")}


async def mixed_load(server: Server) -> None:
    """Answers, streams, clients that leave, and refusals, all at once."""
    url = f"{server.url}/v1/completions"
    async with httpx.AsyncClient(timeout=120) as client:

        async def ask(number: int) -> None:
            body = {
                "model": NAMES[number % 4],
                "prompt": f"{number} The",
                "max_tokens": 8 + number,
                "n": 1 + number % 2,
            }
            if number % 5 == 0:
                body["temperature"] = 99
            await client.post(url, json=body)

        async def leave(number: int) -> None:
            body = {"model": NAMES[number % 4], "prompt": "The", "max_tokens": 400, "ignore_eos": True, "stream": True}
            async with client.stream("POST", url, json=body) as answer:
                lines = answer.aiter_lines()
                for _ in range(1 + number):
                    await anext(lines)

        await asyncio.gather(*(ask(n) for n in range(20)), *(leave(n) for n in range(8)))
        while (await client.get(f"{server.url}/v1/stats")).json()["in_flight"]:
            await asyncio.sleep(0.05)


async def answers_until_the_kill(server: Server) -> int:
    """Kills the server with -9 while clients stream; how many answers of 3 tokens they had to the end by then."""
    num_completed = 0

    async def ask_again_and_again(number: int, client: httpx.AsyncClient) -> None:
        nonlocal num_completed
        body = {"model": NAMES[number % 4], "prompt": "The", "max_tokens": 3, "ignore_eos": True, "stream": number < 4}
        while True:
            try:
                answer = await client.post(f"{server.url}/v1/completions", json=body)
            except httpx.HTTPError:
                return
            assert answer.status_code == 200
            num_completed += 1
            if num_completed == 40:
                server.process.send_signal(signal.SIGKILL)

    async with httpx.AsyncClient(timeout=120) as client:
        await asyncio.gather(*(ask_again_and_again(number, client) for number in range(NUM_CLIENTS)))
    server.process.wait()
    return num_completed


@dataclass
class Lives:
    """Three lives of one data folder: the first ends with SIGTERM, the second with -9."""

    first: dict[str, Any]
    first_counters: dict[str, Any]
    second_at_start: dict[str, Any]
    num_completed: int
    third_at_start: dict[str, Any]


@pytest.fixture(scope="module")
def lives(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Lives:
    folder: Path = tmp_path_factory.mktemp("usage")
    mine = {**settings, "data_dir": str(folder / "data")}
    with running(mine, folder / "log1") as server:
        asyncio.run(mixed_load(server))
        first, first_counters = usage(server, group_by="tenant,adapter,day"), counters(server)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
    with running(mine, folder / "log2") as server:
        second = usage(server)
        num_completed = asyncio.run(answers_until_the_kill(server))
    with running(mine, folder / "log3") as server:
        third = usage(server)
    return Lives(first, first_counters, second, num_completed, third)


def test_usage_is_what_the_metrics_say(lives: Lives) -> None:
    assert counts(lives.first["total"]) == lives.first_counters
    assert set(lives.first_counters["outcomes"]) == {"ok", "cancelled", "invalid"}
    assert {row["adapter"] for row in lives.first["data"]} == {None, "small", "middle", "large"}


def test_a_restart_loses_nothing(lives: Lives) -> None:
    before, after = lives.first["total"], lives.second_at_start["total"]
    assert counts(after) == counts(before)
    assert after["stored_bytes"] == before["stored_bytes"] > 0
    assert after["slot_seconds"] >= before["slot_seconds"] > 0


def test_every_answer_that_was_completed_survives_kill_9(lives: Lives) -> None:
    before, after = lives.second_at_start["total"], lives.third_at_start["total"]
    num_counted = after["outcomes"]["ok"] - before["outcomes"]["ok"]
    assert num_counted - lives.num_completed in range(NUM_CLIENTS + 1), "besides, at most what was under way"
    assert after["completion_tokens"] - before["completion_tokens"] == 3 * num_counted
    assert after["requests"] - before["requests"] == num_counted


def run(server: Server, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "manylora", "usage", *words],
        capture_output=True, text=True, check=False, timeout=120, env={**os.environ, "MANYLORA_URL": server.url},
    )  # fmt: skip


def test_the_csv_is_the_json(server: Server) -> None:
    server.client().completions.create(model="small", prompt="The", max_tokens=2)
    expected = json.loads(run(server, "--json", "--group-by", "tenant,adapter,day").stdout)["data"]
    rows = list(csv.DictReader(io.StringIO(run(server, "--csv", "--group-by", "tenant,adapter,day").stdout)))
    names = ("day", "tenant", "requests", "prompt_tokens", "completion_tokens", "stored_bytes")
    assert [[row[name] for name in names] for row in rows] == [[str(row[name]) for name in names] for row in expected]
    assert [row["adapter"] for row in rows] == [row["adapter"] or "" for row in expected]
    outcomes = [f"requests_{name}" for name in ("ok", "cancelled", "invalid", "rejected", "error")]
    assert all(sum(int(row[name]) for name in outcomes) == int(row["requests"]) for row in rows)
    assert any(row["adapter"] == "small" for row in rows)


def test_the_table_has_a_total(server: Server) -> None:
    shown = run(server).stdout
    assert "completion tokens" in shown
    assert "total" in shown.splitlines()[-1]


def test_a_bad_time_is_a_usage_error_that_names_it(server: Server) -> None:
    refused = run(server, "--from", "yesterday")
    assert refused.returncode == 2
    assert "'from' is no date" in refused.stderr
    assert run(server, "--csv", "--json").returncode == 2
