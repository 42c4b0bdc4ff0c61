"""What tokens that must come save in JSON answers of the shipped `order-json` adapter, asked one at a time over HTTP.

    manylora serve --adapters adapters
    manylora adapters push adapters/order-json --name order-json-free
    manylora adapters set order-json-free --clear
    python -m benchmarks.orders [--url http://127.0.0.1:8000] [--rounds 3]

Each order of a round is asked in three ways in turn: free (of an adapter without defaults), held to the schema of its
answer, and as the adapter's own defaults have it, which hold it to the schema with the separators that it learnt. The
first token is the prompt's, so a rate is of the tokens behind it, by the times at which the stream's events come.
Prints a JSON line for each round, and the medians of the ratios to free.
"""

import argparse
import json
import random
import statistics
import time
from typing import Any

import httpx

from manylora.lifecycle.recipes.order_json import SCHEMA, make

_ORDERS = 16
WAYS: dict[str, dict[str, Any]] = {
    "free": {"model": "order-json-free"},
    "schema": {"model": "order-json", "structured_outputs": {"json": SCHEMA}},
    "defaults": {"model": "order-json"},
}


def ask(client: httpx.Client, prompt: str, fields: dict[str, Any]) -> tuple[str, int, float]:
    """The answer, its tokens behind the first event's, and the seconds from that event to the last with text."""
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": 96,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        **fields,
    }
    text, counts, times = "", [], []
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            content = event["choices"][0]["delta"].get("content") if event["choices"] else None
            if content:
                text += content
                counts.append(event["usage"]["completion_tokens"])
                times.append(time.perf_counter())
    return text, counts[-1] - counts[0], times[-1] - times[0]


def measure(client: httpx.Client, seed: int) -> dict[str, dict[str, float]]:
    """One round: each way's tokens per second, answer tokens, and share of answers that are as wanted."""
    rows = random.Random(seed).sample(make(seed).test, _ORDERS)
    found: dict[str, list[tuple[bool, int, float]]] = {way: [] for way in WAYS}
    for row in rows:
        for way, fields in WAYS.items():
            text, tokens, seconds = ask(client, str(row["prompt"]), fields)
            found[way].append((text == row["completion"], tokens, seconds))
    return {
        way: {
            "tokens_per_s": round(sum(t for _, t, _ in each) / sum(s for _, _, s in each), 1),
            "tokens": statistics.mean(t for _, t, _ in each),
            "as_wanted": sum(right for right, _, _ in each) / len(each),
        }
        for way, each in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rounds = []
    with httpx.Client(base_url=args.url, timeout=120) as client:
        measure(client, 0)  # warms up
        for _ in range(args.rounds):
            rounds.append(measure(client, time.time_ns() % 10**9))
            print(json.dumps(rounds[-1]), flush=True)
    ratios = {
        way: round(statistics.median(each[way]["tokens_per_s"] / each["free"]["tokens_per_s"] for each in rounds), 3)
        for way in WAYS
    }
    print(json.dumps({"ratios": ratios}), flush=True)


if __name__ == "__main__":
    main()
