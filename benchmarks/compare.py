"""Compares manylora with any OpenAI-compatible servers: the same requests, alternating, in one run.

    python benchmarks/compare.py --model MODEL_DIR --out results/ \\
        --server 'vllm=vllm serve {model} --port {port} --served-model-name {base} --enable-lora --max-loras 32
                  --max-lora-rank 64 --max-cpu-loras 64 --lora-modules {lora_modules}'

manylora is always the first server (`--manylora` changes its command). In commands, `{model}`, `{port}`, `{base}`
(the base's name in requests), `{adapters}` (a folder of PEFT folders) and `{lora_modules}` (name=path …) are filled
in; `--url name=http://…` says where a server listens that does not take `{port}`. All servers run side by side and
every one but the measured one is paused (SIGSTOP). Each workload goes A B A B …, `--repeats` times, with new texts each
round, after one warm-up. Absolute figures belong to the machine; read the ratios.
"""

import argparse
import asyncio
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, outside an installed checkout

from benchmarks.servers import Server, end_on_sigterm, fill_in, free_port
from benchmarks.workloads import EQUAL_PATTERN, FLEET_SIZE, MIXED_PATTERN, MIXED_RANKS, Workload, comparison
from manylora_loadtest.fleet import make_fleet
from manylora_loadtest.machine import machine
from manylora_loadtest.runner import run_scenario
from manylora_loadtest.summary import summarise

BASE_NAME = "base"
MANYLORA = (
    f"{sys.executable} -m manylora serve {{model}} --served-name {{base}} --adapters {{adapters}} "
    "--data-dir {data} --port {port} --max-rank 64"
)


def main() -> None:
    end_on_sigterm()
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    folders = make_fleet(args.model, args.out / "fleet", FLEET_SIZE, [16], pattern=EQUAL_PATTERN)
    folders += make_fleet(args.model, args.out / "fleet", FLEET_SIZE, MIXED_RANKS, pattern=MIXED_PATTERN, seed=2)
    servers = list(_servers(args, folders))
    workloads = list(comparison(args.adapters, args.concurrency, variations=args.variations))
    console = Console()
    records: list[dict[str, Any]] = []
    try:
        for server in servers:
            server.start(args.ready_within_s)
            console.print(f"{server.name} is ready after {server.start_s:.1f} s")
            if args.pause_idle:
                server.pause()
        with (args.out / "compare.jsonl").open("w", encoding="utf-8") as file:
            for record in _measurements(args, servers, workloads, console):
                records.append(record)
                file.write(json.dumps(record) + "\n")
                file.flush()
    finally:
        for server in servers:
            server.stop()
    rows = list(ratios(records, [server.name for server in servers]))
    console.print(_table(rows, [server.name for server in servers]))
    draw(rows, [server.name for server in servers], args.out / "compare.png")


def _measurements(
    args: argparse.Namespace, servers: Sequence[Server], workloads: Sequence[Workload], console: Console
) -> Iterator[dict[str, Any]]:
    """The set-up, then one record per workload, round and server."""
    commands = {server.name: shlex.join(server.command) for server in servers}
    starts = {server.name: server.start_s for server in servers}
    yield {"record": "setup", "machine": machine(), "commands": commands, "start_s": starts, "repeats": args.repeats}
    for workload in workloads:
        for repeat in range(-1, args.repeats):  # -1: warm-up, thrown away
            for server in servers:
                with server.awake(args.pause_idle):
                    record = measure(server, workload, scale=args.scale if repeat >= 0 else 0.5, seed=repeat + 1)
                if repeat < 0:
                    continue
                console.print(
                    f"{workload.name:42} {server.name:10} {record['output_tokens_per_s']:8.1f} tokens/s",
                    highlight=False,
                )
                yield {"record": "measurement", "repeat": repeat, **record}


def measure(server: Server, workload: Workload, *, scale: float, seed: int) -> dict[str, Any]:
    """One run of `workload`: throughput and latencies, errors counted."""
    run = asyncio.run(run_scenario(workload.scenario(BASE_NAME, scale=scale, seed=seed), server.url))
    summary = summarise(run)
    errors = sorted({result.error for result in run.results if not result.is_ok})
    return {
        "server": server.name,
        "workload": workload.name,
        "parameters": workload.model_dump(mode="json"),
        "requests": summary.overall.requests,
        "errors": summary.overall.requests - summary.overall.ok,
        "error_messages": errors[:3],
        "output_tokens": summary.overall.output_tokens,
        "prompt_tokens": summary.overall.prompt_tokens,
        "output_tokens_per_s": summary.overall.output_tokens_per_s,
        "latency_s": summary.overall.latency_s,
        "client_cpu_share": summary.client.cpu_share,
    }


def ratios(records: Sequence[dict[str, Any]], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Per workload: each server's rates by round, and for each round the first server's rate over the other's.

    Ratios are taken within a round, between runs that were next to each other, and then the median is; a server
    with an error in a round has no rate there.
    """
    by_workload: dict[str, dict[str, dict[int, float]]] = {}
    for record in records:
        if record["record"] == "measurement" and not record["errors"]:
            rates = by_workload.setdefault(record["workload"], {}).setdefault(record["server"], {})
            rates[record["repeat"]] = record["output_tokens_per_s"]
    for workload, servers in by_workload.items():
        row: dict[str, Any] = {"workload": workload, "rates": {}, "ratios": {}}
        for name in names:
            rates = servers.get(name, {})
            row["rates"][name] = median(list(rates.values()))
            first = servers.get(names[0], {})
            row["ratios"][name] = median([first[k] / rate for k, rate in rates.items() if k in first and rate])
        yield row


def median(values: Sequence[float]) -> float | None:
    """None for no values."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    if not ordered:
        return None
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _table(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Table:
    table = Table(title="output tokens/s, median of the rounds", title_justify="left", box=None, padding=(0, 2))
    table.add_column("workload")
    for name in names:
        table.add_column(name, justify="right")
    for name in names[1:]:
        table.add_column(f"{names[0]} / {name}", justify="right", style="bold")
    for row in rows:
        rates = [_cell(row["rates"][name], "{:.1f}") for name in names]
        table.add_row(row["workload"], *rates, *(_cell(row["ratios"][name], "{:.2f} ×") for name in names[1:]))
    return table


def _cell(value: float | None, form: str) -> str:
    return "failed" if value is None else form.format(value)


def draw(rows: Sequence[dict[str, Any]], names: Sequence[str], path: Path) -> None:
    """Bars of every server's rate for every workload, as PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    height = 0.8 / len(names)
    figure, ax = pyplot.subplots(figsize=(9, 1.2 + 0.22 * (len(names) + 1) * len(rows)), layout="constrained")
    for number, name in enumerate(names):
        places = [row + number * height for row in range(len(rows))]
        bars = ax.barh(places, [row["rates"][name] or 0 for row in rows], height, label=name)
        ax.bar_label(bars, [_cell(row["rates"][name], "{:.0f}") for row in rows], padding=3, fontsize=8)
    ax.set_yticks([row + height * (len(names) - 1) / 2 for row in range(len(rows))], [row["workload"] for row in rows])
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    ax.set(xlabel="output tokens/s, median of the rounds")
    ax.legend(frameon=False)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _servers(args: argparse.Namespace, folders: Sequence[Path]) -> Iterator[Server]:
    urls = dict(_pair(text) for text in args.url)
    commands = [("manylora", args.manylora), *(_pair(text) for text in args.server)]
    for number, (name, command) in enumerate(commands):
        port = free_port()
        values = {
            "model": str(args.model.resolve()), "port": str(port), "base": BASE_NAME,
            "adapters": str((args.out / "fleet").resolve()), "data": str((args.out / "data").resolve()),
            "lora_modules": " ".join(f"{folder.name}={folder.resolve()}" for folder in folders),
        }  # fmt: skip
        ready_path = args.ready_path if number == 0 else "/v1/models"
        url = urls.get(name, f"http://127.0.0.1:{port}").rstrip("/").removesuffix("/v1")
        yield Server(name, fill_in(command, values), url, args.out / f"{name}.log", ready_path)


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise SystemExit(f"{text!r} should be name=…")
    return name.strip(), value.strip()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the base, a Hugging Face folder with safetensors")
    parser.add_argument("--out", type=Path, required=True, help="folder for results, logs and the adapters")
    parser.add_argument("--manylora", default=MANYLORA, help="manylora's command")
    parser.add_argument("--server", action="append", default=[], metavar="NAME=COMMAND", help="another server")
    parser.add_argument("--url", action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--ready-path", default="/ready", help="of the first server; the others': /v1/models")
    parser.add_argument("--ready-within-s", type=float, default=600)
    parser.add_argument("--adapters", type=_numbers, default=(0, 1, 8, 32), metavar="0,1,8,32")
    parser.add_argument("--concurrency", type=_numbers, default=(1, 8, 32), metavar="1,8,32")
    variations = "also short and long prompts, mixed ranks, Zipf"
    parser.add_argument("--variations", action=argparse.BooleanOptionalAction, default=True, help=variations)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of requests")
    parser.add_argument("--pause-idle", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
