"""What the metrics cost: the standard workload with them and without, alternating, in one run.

    python benchmarks/metrics_cost.py MODEL_DIR --fleet FOLDER [--pairs 12] [--only calls|engine|http]

`calls`: microseconds of one recording. `engine`: decode steps of 32 rows with 32 adapters, every other one recorded, by
processor time. `http`: two servers side by side, one with `--no-metrics`; the one with metrics is also scraped every
five seconds. Runs are short, 32 requests at once, so that a pair falls into the same minute of the machine; within a
pair the order changes from pair to pair, and both servers are started anew a few times, since one process may be
luckier with its memory than another. Prints one JSON line per measurement, and the pairs' ratios with against without,
their median, mean and its standard error: by the clock, and by the processor time of the process that serves, which
other programs on the machine disturb less. FOLDER is filled with 32 adapters of rank 16 where it does not exist.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, outside an installed checkout

from benchmarks.compare import BASE_NAME, measure
from benchmarks.servers import Server, end_on_sigterm, fill_in, free_port
from benchmarks.steps import Folders, load_all, sequence
from benchmarks.workloads import EQUAL_PATTERN, FLEET_SIZE, OUTPUT_TOKENS, standard
from manylora.api.record import RequestRecord
from manylora.engine.build import EngineBuilder
from manylora.engine.interface import AdapterRef, RequestTiming
from manylora.metrics import Metrics, NoMetrics
from manylora.models.loading import load_base
from manylora.settings import load_settings
from manylora_loadtest.fleet import make_fleet

COMMAND = (
    f"{sys.executable} -m manylora serve {{model}} --served-name {BASE_NAME} --adapters {{adapters}} "
    "--data-dir {data} --port {port}"
)
SCRAPE_EVERY_S = 5.0
Rates = tuple[float, float]  # output tokens per second, and per second of processor time


def main() -> None:
    end_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--fleet", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=12, help="of http")
    parser.add_argument("--starts", type=int, default=2, help="of http's two servers; even: each is first as often")
    parser.add_argument("--scale", type=float, default=0.5, help="of a run of http: 1 is 64 requests")
    parser.add_argument("--steps", type=int, default=100, help="of engine, with and without each")
    parser.add_argument("--only", choices=["calls", "engine", "http"])
    args = parser.parse_args()
    if not args.fleet.exists():
        make_fleet(args.model, args.fleet, FLEET_SIZE, [16], pattern=EQUAL_PATTERN)
    if args.only in (None, "calls"):
        print(json.dumps({"measured": "calls", **calls()}), flush=True)
    if args.only in (None, "engine"):
        print(json.dumps({"measured": "engine", **engine(args)}), flush=True)
    if args.only in (None, "http"):
        report("http", http(args))


def report(measured: str, rates: Iterator[tuple[bool, Rates]]) -> None:
    """Print each rate and, at the end, the ratios of the pairs. `rates` alternates in pairs."""
    pairs: list[dict[bool, Rates]] = []
    for is_on, (by_clock, by_cpu) in rates:
        if not pairs or len(pairs[-1]) == 2:
            pairs.append({})
        pairs[-1][is_on] = by_clock, by_cpu
        line = {"output_tokens_per_s": round(by_clock, 1), "output_tokens_per_cpu_s": round(by_cpu, 2)}
        print(json.dumps({"measured": measured, "metrics": "on" if is_on else "off", **line}), flush=True)
    for number, name in enumerate(("clock", "cpu")):
        found = [pair[True][number] / pair[False][number] for pair in pairs]
        error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0
        figures = {"median": statistics.median(found), "mean": statistics.mean(found), "standard_error": error}
        ratios = [round(ratio, 4) for ratio in found]
        rounded = {k: round(v, 4) for k, v in figures.items()}
        print(json.dumps({"measured": measured, "by": name, "ratios": ratios, **rounded}), flush=True)


def order(pairs: int) -> Iterator[bool]:
    for number in range(pairs):
        yield from ((True, False) if number % 2 else (False, True))


# calls


def calls() -> dict[str, float]:
    """Microseconds of a step's recordings and of a request's, with 64 output tokens."""
    metrics = Metrics()
    gaps = (0.1,) * (OUTPUT_TOKENS - 1)
    samples = [
        RequestRecord(
            request_id="r",
            tenant="acme",
            adapter=AdapterRef(f"v{i}", "acme", f"a{i:03d}", 1, "d"),
            outcome="ok",
            finished_at=0.0,
            duration_s=7.0,
            ttft_s=0.7,
            timing=RequestTiming(queue_ms=100, load_ms=0, load_tier="device", ttft_ms=700),
            prompt_tokens=128,
            completion_tokens=OUTPUT_TOKENS,
            gaps_s=gaps,
        )
        for i in range(FLEET_SIZE)
    ]

    def step() -> None:
        for phase in ("schedule", "forward", "sample", "deliver"):
            metrics.observe_step(phase, 0.02)

    def request() -> None:
        for sample in samples:
            metrics.observe_request(sample)

    return {
        "step_us": round(microseconds(step), 2),
        "request_us": round(microseconds(request) / FLEET_SIZE, 2),
        "scrape_ms": round(microseconds(metrics.render, 20) / 1e3, 2),
        "scrape_kilobytes": round(len(metrics.render()) / 1e3),
    }


def microseconds(call: Callable[[], object], times: int = 500) -> float:
    """The median over a few rounds."""
    found = []
    for _ in range(7):
        began = time.perf_counter()
        for _ in range(times):
            call()
        found.append((time.perf_counter() - began) / times * 1e6)
    return statistics.median(found)


# engine


def engine(args: argparse.Namespace) -> dict[str, float]:
    """Medians over the steps with and without recording, in ms, and how much slower the former are."""
    settings = load_settings(model=str(args.model))
    observers = (Metrics().observe_step, NoMetrics().observe_step)
    built, tiers = EngineBuilder(settings, load_base(settings)).build_core(Folders(), Metrics())
    refs = load_all(tiers, sorted(p.parent for p in args.fleet.rglob("adapter_config.json")))
    seqs = [sequence(i, refs, 128, 2 * args.steps + 16) for i in range(FLEET_SIZE)]
    for seq in seqs:
        built.add(seq)
    while any(seq.num_output_tokens < 2 for seq in seqs):
        built.step()
    spent: tuple[list[float], list[float]] = ([], [])
    for number in range(2 * args.steps):
        built._observe = observers[number % 2]
        began = time.process_time()
        built.step()
        spent[number % 2].append((time.process_time() - began) * 1e3)
    built.abort(seqs)
    tiers.close()
    with_it, without = (statistics.median(times) for times in spent)
    return {"steps": args.steps, "with_ms": round(with_it, 2), "without_ms": round(without, 2),
            "ratio": round(without / with_it, 4)}  # fmt: skip


# http


def http(args: argparse.Namespace) -> Iterator[tuple[bool, Rates]]:
    for start in range(args.starts):
        yield from one_start(args, start)


def one_start(args: argparse.Namespace, start: int) -> Iterator[tuple[bool, Rates]]:
    """A part of the pairs, on two new servers."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        servers = {is_on: server(args, Path(scratch), is_on=is_on) for is_on in (start % 2 == 0, start % 2 == 1)}
        for each in servers.values():
            each.start(180)
            stack.callback(each.stop)
            measure(each, standard(), scale=0.5, seed=0)
            each.pause()
        for number, is_on in enumerate(order(args.pairs // args.starts)):
            with servers[is_on].awake(True), scraped(servers[is_on].url if is_on else None):
                cpu = cpu_s(servers[is_on])
                record = measure(servers[is_on], standard(), scale=args.scale, seed=1000 * start + 1 + number // 2)
                cpu = cpu_s(servers[is_on]) - cpu
            if record["errors"]:
                raise SystemExit(f"{record['errors']} requests failed: {record['error_messages']}")
            yield is_on, (record["output_tokens_per_s"], record["output_tokens"] / cpu)


def cpu_s(server: Server) -> float:
    assert server._process is not None
    spent = psutil.Process(server._process.pid).cpu_times()
    return float(spent.user + spent.system)


def server(args: argparse.Namespace, scratch: Path, *, is_on: bool) -> Server:
    name = "with" if is_on else "without"
    port = free_port()
    values: dict[str, Any] = {
        "model": str(args.model.resolve()), "port": str(port), "adapters": str(args.fleet.resolve()),
        "data": str(scratch / name),
    }  # fmt: skip
    command = fill_in(COMMAND + ("" if is_on else " --no-metrics"), values)
    return Server(name, command, f"http://127.0.0.1:{port}", scratch / f"{name}.log", "/ready")


@contextlib.contextmanager
def scraped(url: str | None) -> Iterator[None]:
    """Read `/metrics` every few seconds; Prometheus' own habit is fifteen."""
    is_over = threading.Event()

    def scrape() -> None:
        while not is_over.wait(SCRAPE_EVERY_S):
            urllib.request.urlopen(f"{url}/metrics", timeout=30).read()

    thread = threading.Thread(target=scrape)
    if url is not None:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        if url is not None:
            thread.join()


if __name__ == "__main__":
    main()
