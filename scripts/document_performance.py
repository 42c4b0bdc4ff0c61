"""Writes the tables and the picture of docs/performance*.md from benchmarks/results/*.jsonl: `make docs`.

A results file holds one line with `"record": "setup"` (the day, the machine, the commands) and then one line per
measurement, as `benchmarks/compare.py` writes them; benchmarks/results/README.md says what the keys mean.
"""

import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parent.parent
RESULTS: Final = ROOT / "benchmarks" / "results"
PAGES: Final = (ROOT / "docs" / "performance.md", ROOT / "docs" / "performance-history.md")
PICTURE: Final = ROOT / "docs" / "images" / "performance.svg"
OTHER: Final = "vLLM"
END: Final = "<!-- end of results -->"
Record = dict[str, Any]


def read(name: str) -> tuple[Record, list[Record]]:
    """The set-up and the measurements of one results file. Raises ValueError for a file without a set-up."""
    lines = (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    if not records or records[0].get("record") != "setup":
        raise ValueError(f"{name}.jsonl does not begin with its set-up")
    return records[0], [record for record in records if record["record"] == "measurement"]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in lines)


def servers(setup: Record) -> list[str]:
    """The compared servers, in the order of their commands."""
    return list(setup["commands"])


def of(measured: Iterable[Record], server: str, adapters: int, concurrency: int) -> list[Record]:
    """One server's measurements without errors on one workload, a round each."""
    wanted = (server, adapters, concurrency)
    return [
        record
        for record in measured
        if (record["server"], record["parameters"]["adapters"], record["parameters"]["concurrency"]) == wanted
        and not record.get("errors")
    ]


def rates(measured: Iterable[Record], server: str, adapters: int, concurrency: int = 32) -> list[float]:
    """Output tokens per second of each round."""
    return [record["output_tokens_per_s"] for record in of(measured, server, adapters, concurrency)]


def listed(values: Iterable[float], form: str = "{:.0f}") -> str:
    """All rounds, in order."""
    return ", ".join(form.format(value) for value in values)


def spread(values: Sequence[float], form: str) -> str:
    """From the least to the most, or one figure where they are shown alike."""
    least, most = form.format(min(values)), form.format(max(values))
    return least if least == most else f"{least} to {most}"


def latency(setup: Record, measured: Iterable[Record], server: str, name: str) -> list[float]:
    """Medians of a latency in seconds with 32 adapters, by round; where only their range was kept, its two ends."""
    kept = setup.get("latency_s_over_rounds", {}).get(server)
    if kept is not None:
        return list(kept[f"{name}_p50"])
    return [record["latency_s"][name]["p50"] for record in of(measured, server, 32, 32)]


def standard() -> str:
    """The standard workload: servers, their rates with 32 adapters and none, latencies."""
    setup, measured = read("standard")
    other = next(server for server in servers(setup) if server.lower().startswith(OTHER.lower()))
    theirs = {record["repeat"]: record["output_tokens_per_s"] for record in of(measured, other, 32, 32)}
    rows = []
    for server in servers(setup):
        ours = rates(measured, server, 32)
        pairs = [(r["output_tokens_per_s"], theirs.get(r["repeat"])) for r in of(measured, server, 32, 32)]
        times = [mine / their for mine, their in pairs if their and server != other]
        tpot = [1000 * value for value in latency(setup, measured, server, "tpot")]
        ttft = latency(setup, measured, server, "ttft")
        bare = listed(rates(measured, server, 0))
        rows.append(
            [server, listed(ours), listed(times, "{:.1f}"), bare, spread(tpot, "{:.0f}"), spread(ttft, "{:.2g}")]
        )
    head = ["server", "32 adapters, output tokens/s", f"times {OTHER}", "bare base", "TPOT p50, ms", "TTFT p50, s"]
    return table(head, rows)


def standard_avx2() -> str:
    """Rates and the latency of one request, with adapters and without."""
    setup, measured = read("standard-avx2")

    def tpot(server: str, adapters: int) -> str:
        return listed(1000 * record["latency_s"]["tpot"]["p50"] for record in of(measured, server, adapters, 1))

    rows = [
        [name, *(listed(rates(measured, name, count)) for count in (32, 0)), *(tpot(name, count) for count in (32, 0))]
        for name in servers(setup)
    ]
    one = "one request with an adapter, TPOT in ms"
    return table(["server, float32", "32 adapters, output tokens/s", "bare base", one, "bare"], rows)


def steps() -> str:
    """The parts of one decode step."""
    _, measured = read("steps")
    parts = list(dict.fromkeys(part for record in measured for part in record["parts_ms"]))
    rows = []
    for record in measured:
        num_rows, adapters = record["rows"], record["adapters"]
        who = f"{adapters} adapters" if adapters > 1 else "an adapter" if adapters else "bare base"
        cells = [record["parts_ms"].get(part) for part in parts]
        shown = ["" if c is None else spread(c, "{:g}") if isinstance(c, list) else f"{c:g}" for c in cells]
        what = f"{num_rows} row{'s' if num_rows > 1 else ''}, {who}, {record['dtype']}"
        rows.append([what, spread(record["step_ms"], "{:g}"), *shown])
    return table(["", "whole", *(part.replace("_", " ") for part in parts)], rows)


def kernels() -> str:
    """How many times faster than torch each kernel is, by rows."""
    _, measured = read("kernels-avx2")
    rows = []
    for num_rows in dict.fromkeys(record["rows"] for record in measured):
        cells = []
        for kernel in ("linear", "int8 linear", "low-rank delta"):
            of_kernel = [r["times_torch"] for r in measured if (r["rows"], r["kernel"]) == (num_rows, kernel)]
            cells.append(listed(of_kernel, "{:g}"))
        rows.append([str(num_rows), *cells])
    shapes = ", ".join(f"{a} → {b}" for a, b in dict.fromkeys(tuple(r["shape"]) for r in measured if "shape" in r))
    return table(["rows", f"linear {shapes}", "int8 linear", "low-rank delta: float32, bfloat16, int8"], rows)


def slots() -> str:
    """What fewer slots than adapters cost, over a server with room for all."""
    _, measured = read("slots")
    names = list(measured[0]["ratios"])
    rows = [
        [
            f"{r['adapters']} adapters in {r['slots']} slots",
            *(listed(r["ratios"][name], "{:.2f}") + " ×" for name in names),
        ]
        for r in measured
    ]
    shown = [name.replace("output_tokens_per_s", "output tokens/s").replace("_", " ") for name in names]
    return table(["", *(re.sub(r"^t(tft|pot)", lambda match: match[0].upper(), name) for name in shown)], rows)


def quality() -> str:
    """Perplexity of the base and the KV cache as they are and rounded."""
    _, measured = read("quality")
    rows = [
        [record["kept_as"], f"{record['perplexity']:.2f}", f"{100 * record['above_first']:+.1f} %"]
        for record in measured
    ]
    return table(["kept as", "perplexity", "above the first"], rows)


TABLES: Final[dict[str, Callable[[], str]]] = {
    "standard": standard,
    "standard-avx2": standard_avx2,
    "steps": steps,
    "kernels-avx2": kernels,
    "slots": slots,
    "quality": quality,
}


def with_tables(page: str) -> str:
    """The page with every marked table replaced by what the results say."""

    def fresh(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{END}"

    return re.sub(rf"(<!-- results: ([\w-]+), written by `make docs` -->)\n.*?{END}", fresh, page, flags=re.DOTALL)


def picture() -> str:
    """Bars of every server's median rate with 32 adapters and on the bare base, as SVG."""
    setup, measured = read("standard")
    bars = [
        (server, statistics.median(rates(measured, server, 32)), rates(measured, server, 0))
        for server in servers(setup)
    ]
    most = max(max(rate, *bare) if bare else rate for _, rate, bare in bars)
    left, width, line, top = 240, 480, 58, 44
    height = top + line * len(bars) + 10
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="800" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="800" height="{height}" fill="white"/>',
        f'<text x="{left}" y="24" fill="#333">output tokens/s, 32 requests at a time: '
        '<tspan fill="#1f6fb2">32 adapters</tspan>, <tspan fill="#767676">bare base</tspan></text>',
    ]
    for number, (server, rate, bare) in enumerate(bars):
        y = top + number * line
        drawn.append(f'<text x="{left - 10}" y="{y + 27}" text-anchor="end" fill="#333">{escape(server)}</text>')
        pairs = [(rate, "#1f6fb2", 0), *([(statistics.median(bare), "#a8a8a8", 22)] if bare else [])]
        for value, colour, down in pairs:
            wide = round(width * value / most)
            drawn.append(f'<rect x="{left}" y="{y + down}" width="{wide}" height="20" fill="{colour}"/>')
            drawn.append(f'<text x="{left + wide + 6}" y="{y + down + 15}" fill="#333">{value:.0f}</text>')
    return "\n".join([*drawn, "</svg>"]) + "\n"


if __name__ == "__main__":
    for each in PAGES:
        each.write_text(with_tables(each.read_text(encoding="utf-8")), encoding="utf-8")
    PICTURE.write_text(picture(), encoding="utf-8")
