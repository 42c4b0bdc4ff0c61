"""What drafted tokens gain, and what they cost where nothing can be guessed.

    python -m benchmarks.drafts [--rounds 3] [--adapters adapters] [-- flags of manylora serve]

Two servers, without drafts and with, of which one is stopped while the other is asked. Each round has new questions of
the shipped adapters `sql` and `order-json`, asked one at a time and greedily (the answers must be the same), and 32
requests at a time whose prompts and answers are random (temperature 1.5). Prints a JSON line for each round and the
medians of the ratios, output tokens per second with drafts over without.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from benchmarks.servers import Server, end_on_sigterm, free_port
from manylora.lifecycle.recipes import order_json, sql

QUESTIONS = 12
_RECIPES = {"sql": sql.make, "order-json": order_json.make}
Measured = dict[str, float]


def chat(client: httpx.Client, model: str, prompt: str) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 96}
    response = client.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer


def ask_in_turn(client: httpx.Client, model: str, prompts: list[str]) -> tuple[list[str], Measured]:
    """The answers, and their tokens per second, prompts and all."""
    began = time.perf_counter()
    answers = [chat(client, model, prompt) for prompt in prompts]
    seconds = time.perf_counter() - began
    usages = [answer["usage"] for answer in answers]
    details = [usage.get("completion_tokens_details", {}) for usage in usages]
    accepted = sum(each.get("accepted_prediction_tokens", 0) for each in details)
    rejected = sum(each.get("rejected_prediction_tokens", 0) for each in details)
    tokens = sum(usage["completion_tokens"] for usage in usages)
    figures = {"tokens_per_s": round(tokens / seconds, 1), "tokens": tokens, "accepted": accepted, "rejected": rejected}
    return [answer["choices"][0]["message"]["content"] for answer in answers], figures


def ask_at_random(client: httpx.Client, seed: int) -> Measured:
    """32 at a time, 128 tokens in and 64 out, 64 requests."""
    chance = random.Random(seed)
    base = client.get("/v1/models").json()["data"][0]["id"]
    bodies = [
        {
            "model": base,
            "prompt": [chance.randrange(1000, 40000) for _ in range(128)],
            "max_tokens": 64,
            "ignore_eos": True,
            "temperature": 1.5,
            "seed": chance.randrange(2**31),
        }
        for _ in range(64)
    ]
    began = time.perf_counter()
    with ThreadPoolExecutor(32) as pool:
        usages = [r.json()["usage"] for r in pool.map(lambda body: client.post("/v1/completions", json=body), bodies)]
    seconds = time.perf_counter() - began
    drafted = [sum(usage.get("completion_tokens_details", {}).values()) for usage in usages]
    return {"tokens_per_s": round(64 * 64 / seconds, 1), "drafted": sum(drafted)}


def measure(servers: dict[str, Server], seed: int) -> dict[str, dict[str, Measured]]:
    """One round, in the order of `servers`."""
    chance = random.Random(seed)
    found: dict[str, dict[str, Measured]] = {}
    answers: dict[str, dict[str, list[str]]] = {}
    for way, server in servers.items():
        server.resume()
        with httpx.Client(base_url=server.url, timeout=300, limits=httpx.Limits(max_connections=40)) as client:
            for name, make in _RECIPES.items():
                prompts = [str(row["prompt"]) for row in random.Random(seed).sample(make(seed).test, QUESTIONS)]
                answers.setdefault(name, {})[way], figures = ask_in_turn(client, name, prompts)
                found.setdefault(name, {})[way] = figures
            found.setdefault("random", {})[way] = ask_at_random(client, chance.randrange(2**31))
        server.pause()
    for name, said in answers.items():
        assert said["with"] == said["without"], f"{name} answers otherwise with drafts"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--adapters", type=Path, default=Path("adapters"))
    parser.add_argument("flags", nargs="*", help="more flags of manylora serve, after --")
    args = parser.parse_args()
    end_on_sigterm()
    with tempfile.TemporaryDirectory() as folder:
        servers = {}
        try:
            for way, flags in (("without", ["--draft-tokens", "0"]), ("with", [])):
                port = free_port()
                command = [
                    sys.executable,
                    "-m",
                    "manylora",
                    "serve",
                    "--port",
                    str(port),
                    "--adapters",
                    str(args.adapters),
                ]
                command += ["--data-dir", f"{folder}/{way}", "--kv-cache-memory", "1GiB", *flags, *args.flags]
                url = f"http://127.0.0.1:{port}"
                servers[way] = Server(way, command, url, Path(folder) / f"{way}.log", "/ready")
                servers[way].start(300)
                servers[way].pause()
            measure(servers, 0)  # warms up
            rounds = []
            for _ in range(args.rounds):
                servers = dict(reversed(servers.items()))
                rounds.append(measure(servers, time.time_ns() % 10**9))
                print(json.dumps(rounds[-1]), flush=True)
        finally:
            for server in servers.values():
                server.resume()
                server.stop()
    ratios = {
        name: round(
            statistics.median(r[name]["with"]["tokens_per_s"] / r[name]["without"]["tokens_per_s"] for r in rounds), 3
        )
        for name in (*_RECIPES, "random")
    }
    print(json.dumps({"ratios": ratios}), flush=True)


if __name__ == "__main__":
    main()
