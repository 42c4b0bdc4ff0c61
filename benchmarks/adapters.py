"""Adapters that come and go: what uploads, tight slots and large fleets cost, on real servers over HTTP.

    python benchmarks/adapters.py upload --model MODEL_DIR --out DIR   # 16 streams with and without an upload
    python benchmarks/adapters.py slots  --model MODEL_DIR --out DIR   # 33 adapters in 32 slots, 64 in 8
    python benchmarks/adapters.py zipf   --model MODEL_DIR --out DIR   # 1,000 registered, Zipf 1.0, against 32
    python benchmarks/adapters.py scale  --model MODEL_DIR --out DIR   # 10 and 10,000 registered: start, lists

Compared servers run side by side, take turns (A B A B …), and the one that is not measured is paused. Prints one
JSON line per run and one with the ratios. Folders of adapters and of data below --out are kept and used again;
`--prepare` makes them, and does not measure.
"""

import argparse
import asyncio
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, outside an installed checkout

from benchmarks.compare import BASE_NAME, measure
from benchmarks.registered import register_fleet, register_small
from benchmarks.servers import Server, end_on_sigterm, free_port
from benchmarks.streams import Upload, complete, run_streams
from benchmarks.workloads import Workload
from manylora_loadtest.fleet import make_fleet
from manylora_loadtest.popularity import Popularity

NUM_STREAMS = 16


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


@contextlib.contextmanager
def serving(args: argparse.Namespace, name: str, *flags: str) -> Iterator[Server]:
    """A server with its own data folder `name`, paused until `awake`."""
    port = free_port()
    command = [
        sys.executable, "-m", "manylora", "serve", str(args.model.resolve()), "--served-name", BASE_NAME,
        "--data-dir", str((args.out / name).resolve()), "--port", str(port), "--log-level", "warning", *flags,
    ]  # fmt: skip
    server = Server(name, command, f"http://127.0.0.1:{port}", args.out / f"{name}.log", "/ready")
    try:
        server.start(900)
        server.pause()
        yield server
    finally:
        server.stop()


def fleet(args: argparse.Namespace, count: int) -> Path:
    """A folder of `count` random rank-16 adapters on every linear."""
    root: Path = args.out / f"fleet-{count}"
    make_fleet(args.model, root, count, [16])
    return root


# an upload beside streams


def upload(args: argparse.Namespace) -> None:
    served = fleet(args, NUM_STREAMS)
    spare = make_fleet(args.model, args.out / "spare", args.repeats + 1, [16], pattern="new{:03d}", seed=99)
    models = [f"a{i:03d}" for i in range(NUM_STREAMS)]
    shape = {"prompt_tokens": 16, "output_tokens": args.tokens}
    rows: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    with serving(args, "data-upload", "--adapters", str(served)) as server, server.awake(False):
        asyncio.run(run_streams(server.url, models, prompt_tokens=16, output_tokens=16, seed=0))  # all to the device
        if args.prepare:
            return
        for repeat in range(args.repeats):
            plain = asyncio.run(run_streams(server.url, models, **shape, seed=2 * repeat + 1))
            # New content under a new name each time, well inside the run.
            middle = min(*(t[len(t) // 3] for t in plain.times), 10.0)
            beside = Upload(spare[repeat], f"new-{time.time_ns():x}", middle)
            loaded = asyncio.run(run_streams(server.url, models, **shape, seed=2 * repeat + 2, upload=beside))
            for kind, run in (("without", plain), ("with", loaded)):
                rows[kind].append(run.figures())
                say(run=repeat, upload=kind == "with", **run.figures())
            say(run=repeat, upload_s=beside.upload_s, first_completion_after_s=beside.first_completion_s)
    for figure in ("tpot_p99_ms", "gap_p99_ms", "worst_streams_gap_p99_ms", "gap_max_ms"):
        ratios = [b[figure] / a[figure] for a, b in zip(rows["without"], rows["with"], strict=True)]
        say(figure=figure, with_over_without=[round(r, 3) for r in ratios], median=round(statistics.median(ratios), 3))


# slots


def slots(args: argparse.Namespace) -> None:
    common = ("--adapters", str(fleet(args, 64)), "--host-tier-memory", "2GiB", "--adapter-memory", "2GiB")
    for num_adapters, num_slots in ((33, 32), (64, 8)):
        if args.slots not in (None, num_slots):
            continue
        with (
            serving(args, "data-fits", *common, "--max-slots", "64") as fits,
            serving(args, f"data-{num_slots}-slots", *common, "--max-slots", str(num_slots)) as tight,
        ):
            if args.prepare:
                continue
            workload = Workload(adapters=num_adapters, concurrency=32)
            pairs = alternate(args, workload, workload, fits, tight)
        summary(f"{num_adapters} adapters, {num_slots} slots over all in slots", pairs)


def alternate(
    args: argparse.Namespace, workload_a: Workload, workload_b: Workload, a: Server, b: Server
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Rounds of both servers in turn, after every adapter was asked for once."""
    pairs = []
    for server, workload in ((a, workload_a), (b, workload_b)):
        with server.awake(True):
            asyncio.run(_ask_each(server.url, [f"a{i:03d}" for i in range(workload.adapters)]))
    for repeat in range(args.repeats):
        records = []
        for server, workload in ((a, workload_a), (b, workload_b)):
            with server.awake(True):
                records.append(measure(server, workload, scale=args.scale, seed=repeat + 1))
                say(**_short(records[-1]))
        pairs.append((records[0], records[1]))
    return pairs


async def _ask_each(url: str, names: list[str]) -> None:
    """So that every adapter that fits is in host memory."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=900)) as session:
        for start in range(0, len(names), 32):
            await asyncio.gather(*(complete(session, url, name) for name in names[start : start + 32]))


def _short(record: dict[str, Any]) -> dict[str, Any]:
    latency = record["latency_s"]
    return {
        "server": record["server"], "workload": record["workload"], "requests": record["requests"],
        "errors": record["errors"], "output_tokens_per_s": round(record["output_tokens_per_s"], 1),
        **{f"ttft_{q}_ms": round(latency["ttft"][q] * 1e3, 1) for q in ("p50", "p99")},
        **{f"tpot_{q}_ms": round(latency["tpot"][q] * 1e3, 1) for q in ("p50", "p99")},
    }  # fmt: skip


def summary(what: str, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """The second server's figures over the first's, by round and as a median."""
    for figure in ("output_tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms"):
        ratios = [_short(b)[figure] / _short(a)[figure] for a, b in pairs]
        say(what=what, figure=figure, ratios=[round(r, 3) for r in ratios], median=round(statistics.median(ratios), 3))


# popularity


def zipf(args: argparse.Namespace) -> None:
    for count in (32, 1000):
        register_fleet(args.model, args.out / f"data-{count}", fleet(args, count))
    if args.prepare:
        return
    workloads = [
        Workload(adapters=count, concurrency=32, popularity=Popularity(kind="zipf", s=1.0)) for count in (32, 1000)
    ]
    with serving(args, "data-32") as few, serving(args, "data-1000") as many:
        pairs = alternate(args, workloads[0], workloads[1], few, many)
    summary("1,000 registered, Zipf 1.0, over 32", pairs)


# scale


def scale(args: argparse.Namespace) -> None:
    counts = (10, 10_000)
    for count in counts:
        register_small(args.model, args.out / f"data-small-{count}", count)
    if args.prepare:
        return
    starts: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(args.repeats):
        for count in counts:
            with serving(args, f"data-small-{count}") as server, server.awake(False):
                starts[count].append(server.start_s or 0.0)
                say(registered=count, start_s=round(starts[count][-1], 2), **asyncio.run(_look_around(server.url)))
    more = [b - a for a, b in zip(starts[10], starts[10_000], strict=True)]
    say(figure="start_s", more_with_10000=[round(m, 2) for m in more], median=round(statistics.median(more), 2))


async def _look_around(url: str) -> dict[str, float]:
    """Milliseconds of a list page, of a page far down, of /v1/models, and of a request for a warm adapter."""
    found: dict[str, float] = {}
    async with aiohttp.ClientSession() as session:
        first = await _get(session, f"{url}/v1/adapters")
        thousand = await _get(session, f"{url}/v1/adapters?limit=1000")
        deep = f"{url}/v1/adapters?after={thousand['last_id']}"
        name = first["data"][0]["name"]
        pages = {
            "page": f"{url}/v1/adapters", "deep_page": deep, "one": f"{url}/v1/adapters/{name}",
            "models": f"{url}/v1/models",
        }  # fmt: skip
        for what, path in pages.items():
            times = [await _timed(_get(session, path)) for _ in range(20)]
            found |= {f"{what}_p50_ms": statistics.median(times), f"{what}_max_ms": max(times)}
        await complete(session, url, name)
        found["warm_request_ms"] = statistics.median([await _timed(complete(session, url, name)) for _ in range(20)])
    return {key: round(value, 2) for key, value in found.items()}


async def _get(session: aiohttp.ClientSession, url: str) -> Any:
    async with session.get(url) as response:
        response.raise_for_status()
        return await response.json()


async def _timed(work: Any) -> float:
    began = time.perf_counter()
    await work
    return (time.perf_counter() - began) * 1e3


def main() -> None:
    end_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["upload", "slots", "zipf", "scale"])
    parser.add_argument("--model", type=Path, required=True, help="the base, a Hugging Face folder with safetensors")
    parser.add_argument("--out", type=Path, required=True, help="folder for adapters, data folders and logs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of requests: 1 is two per client")
    parser.add_argument("--tokens", type=int, default=192, help="of each stream in `upload`")
    parser.add_argument("--slots", type=int, choices=[8, 32], help="only this case of `slots`")
    parser.add_argument("--prepare", action="store_true", help="only make the folders")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server outlives the benchmark
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    say(what=args.what, commit=commit.stdout.strip(), repeats=args.repeats, scale=args.scale, tokens=args.tokens)
    {"upload": upload, "slots": slots, "zipf": zipf, "scale": scale}[args.what](args)


if __name__ == "__main__":
    main()
