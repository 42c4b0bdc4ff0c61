"""What a fine-tuning job beside the server takes from those who ask: time to the first token and to the next ones.

    python -m benchmarks.beside_job [--seconds 60] [--turn 5] [--output FILE] [-- flags of manylora serve]

Streams are asked for one after the other by a few callers, in turns of some seconds without a job and with one that
trains (the server's own, at nice 19 on one thread), so that what else happens on the machine meets both. It is one job:
its process is stopped (SIGSTOP) in the turns without it, which are as many, and as often first of two. The goal is that
the 95th percentiles of time to first token and of time per token are within 15 % of those without.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.servers import Server, end_on_sigterm, free_port

MODEL = "base"
GOAL = 0.15
NUM_ROWS = 4_000  # times the epochs, more than any measurement lasts
PROMPT = "The quick brown fox jumps over the lazy dog, and then it "
JOBS = "/v1/fine_tuning/jobs"
CHILD = "manylora.jobs.child"


@dataclass
class Seen:
    """Seconds to the first token, and between two tokens."""

    first_s: list[float] = field(default_factory=list)
    next_s: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        return {f"{name}_{what}": _percentile(values, share) for name, values in (("ttft", self.first_s),
                ("tpot", self.next_s)) for what, share in (("p50", 0.5), ("p95", 0.95))}  # fmt: skip


def _percentile(values: list[float], share: float) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[round(share * 100) - 1] if len(values) > 1 else 0.0


async def ask(session: aiohttp.ClientSession, url: str, number: int, num_tokens: int, seen: Seen) -> None:
    body = {
        "model": MODEL,
        "prompt": f"{number}: {PROMPT}",
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "stream": True,
    }
    began = last = time.perf_counter()
    is_first = True
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                now = time.perf_counter()
                seen.first_s.append(now - began) if is_first else seen.next_s.append(now - last)
                is_first, last = False, now


async def load(url: str, session: aiohttp.ClientSession, seconds: float, callers: int, num_tokens: int) -> Seen:
    """Callers that ask again and again, for so long."""
    seen, until = Seen(), time.monotonic() + seconds

    async def call(caller: int) -> None:
        number = 0
        while time.monotonic() < until:
            await ask(session, url, caller + callers * number, num_tokens, seen)
            number += 1

    await asyncio.gather(*(call(caller) for caller in range(callers)))
    return seen


@asynccontextmanager
async def training(server: Server, session: aiohttp.ClientSession, file_id: str) -> AsyncIterator[psutil.Process]:
    """The process of a job that has begun to learn, and goes on to the end of the block."""
    hyperparameters = {"n_epochs": 50, "batch_size": 8}
    asked = {"model": MODEL, "training_file": file_id, "hyperparameters": hyperparameters}
    async with session.post(server.url + JOBS, json=asked) as answer:
        job = (await answer.json())["id"]
    while (found := await _job(server.url, session, job))["manylora"]["step"] < 2:
        await asyncio.sleep(1)
    [process] = [each for each in psutil.Process(server.pid).children(recursive=True) if CHILD in each.cmdline()]
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        begun, found = found, await _job(server.url, session, job)
        async with session.post(f"{server.url}{JOBS}/{job}/cancel") as answer:
            await answer.read()
        assert found["status"] == "running", f"the job did not run all the time: {found['status']} {found['error']}"
        assert found["manylora"]["step"] > begun["manylora"]["step"], "the job did not get on"


async def _job(url: str, session: aiohttp.ClientSession, job: str) -> dict[str, Any]:
    async with session.get(f"{url}{JOBS}/{job}") as answer:
        found: dict[str, Any] = await answer.json()
    assert found["status"] in ("queued", "running"), found["error"]
    return found


async def measure(server: Server, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    rows = [{"prompt": f"{n} + {n % 97} =", "completion": str(n + n % 97)} for n in range(NUM_ROWS)]
    form = aiohttp.FormData({"purpose": "fine-tune"})
    form.add_field("file", "".join(json.dumps(row) + "\n" for row in rows), filename="sums.jsonl")
    seen = {"without": Seen(), "beside": Seen()}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        async with session.post(f"{server.url}/v1/files", data=form) as answer:
            answer.raise_for_status()
            file_id = (await answer.json())["id"]
        share = (server.url, session, arguments.turn, arguments.callers, arguments.tokens)
        async with training(server, session, file_id) as process:
            await load(*share)
            cpu_s = 0.0
            for pair in range(max(1, round(arguments.seconds / arguments.turn))):
                for name in ("without", "beside") if pair % 2 else ("beside", "without"):
                    process.send_signal(signal.SIGSTOP if name == "without" else signal.SIGCONT)
                    before = _cpu_s(process)
                    _add(seen[name], await load(*share))
                    cpu_s += _cpu_s(process) - before
    return {name: found.figures() for name, found in seen.items()} | {"job": {"cpu_s": cpu_s}}


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _add(total: Seen, part: Seen) -> None:
    total.first_s += part.first_s
    total.next_s += part.next_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of load without a job, and as many with one")
    parser.add_argument("--turn", type=float, default=5.0, help="seconds of a turn")
    parser.add_argument("--callers", type=int, default=4, help="that ask at a time")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--output", type=Path, help="where the figures go as JSON")
    parser.add_argument("flags", nargs="*", help="more flags of manylora serve, after --")
    arguments = parser.parse_args()
    end_on_sigterm()
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        command = [sys.executable, "-m", "manylora", "serve", "--port", str(port), "--data-dir", f"{folder}/data"]
        command += ["--served-name", MODEL, "--jobs", "1", "--log-level", "warning", *arguments.flags]
        server = Server("manylora", command, f"http://127.0.0.1:{port}", Path(folder) / "log", "/ready")
        server.start(300)
        try:
            found = asyncio.run(measure(server, arguments))
        finally:
            server.stop()
    for name, without in found["without"].items():
        more = found["beside"][name] / without - 1 if without else 0.0
        told = (
            f"{name}: {without * 1e3:8.2f} ms without, {found['beside'][name] * 1e3:8.2f} ms beside a job ({more:+.1%})"
        )
        print(told + ("" if more <= GOAL or "p95" not in name else f": more than {GOAL:.0%}"))
    print(f"the job had {found['job']['cpu_s']:.1f} s of CPU time in its {arguments.seconds:g} s")
    if arguments.output:
        machine = {"num_cpus": os.cpu_count(), "load_average": os.getloadavg()[0]}
        asked = {name: getattr(arguments, name) for name in ("seconds", "turn", "callers", "tokens", "flags")}
        arguments.output.write_text(json.dumps({**machine, **asked, **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
