"""How the time of a decode step grows with rows, with adapters and with ranks, and a picture of it.

    python benchmarks/growth.py MODEL --fleet FOLDER --out growth.jsonl [--plot growth.png] [--quantization int8]

One engine holds 32 adapters of each rank (FOLDER is filled with them where they are missing). Every point is measured
in several short turns, all points after one another in each, so that a slow minute of the machine falls on all of them;
what is kept is the median step, in milliseconds. For ranks the roofline stands beside it: the bare base's step plus the
time in which the memory, at the rate measured in the same run, delivers the adapters.
"""

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, outside an installed checkout

from benchmarks.kernels import machine
from benchmarks.steps import Folders, load_all, sequence
from manylora.engine.build import EngineBuilder
from manylora.engine.engine import Engine
from manylora.engine.interface import AdapterRef
from manylora.metrics import Metrics
from manylora.models.loading import load_base
from manylora.settings import load_settings
from manylora_loadtest.fleet import make_fleet

ROWS = (1, 2, 4, 8, 16, 32, 64)
COUNTS = (1, 2, 4, 8, 16, 32)
RANKS = (8, 16, 32, 64)
FLEET_SIZE = 32
STEPS = 8
CONTEXT = 64


@dataclass(frozen=True, slots=True)
class Point:
    """`rows` sequences over `adapters` different adapters of `rank`, in turn."""

    rows: int
    adapters: int
    rank: int = 16


def points() -> Iterator[Point]:
    for rows in ROWS:
        yield Point(rows, 0)
        yield Point(rows, min(rows, FLEET_SIZE))
    yield from (Point(32, count) for count in COUNTS)
    yield from (Point(32, FLEET_SIZE, rank) for rank in RANKS)


def steps(engine: Engine, refs: Sequence[AdapterRef], point: Point, turn: int) -> list[float]:
    """Seconds of a few decode steps."""
    seqs = [sequence(10_000 * turn + i, list(refs[: point.adapters]), CONTEXT, STEPS + 8) for i in range(point.rows)]
    for seq in seqs:
        engine.add(seq)
    while any(seq.num_output_tokens < 2 for seq in seqs):
        engine.step()
    taken = []
    for _ in range(STEPS):
        began = time.perf_counter()
        engine.step()
        taken.append(time.perf_counter() - began)
    engine.abort(seqs)
    return taken


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    settings = load_settings(
        model=str(args.model), quantization=args.quantization, lora_dtype=args.lora_dtype, adapter_memory=6 * 2**30,
        max_slots=len(RANKS) * FLEET_SIZE, kv_cache_memory=2**30,
    )  # fmt: skip
    base = load_base(settings)
    engine, tiers = EngineBuilder(settings, base).build_core(Folders(), Metrics())
    fleets: dict[int, list[AdapterRef]] = {}
    for rank in RANKS:
        folders = make_fleet(args.model, args.fleet / f"rank-{rank}", FLEET_SIZE, [rank])
        fleets[rank] = load_all(tiers, folders, prefix=f"r{rank}-")
    by_id = {each["id"]: each["size_bytes"] for each in tiers.residents()}
    sizes = {rank: by_id[refs[0].id] for rank, refs in fleets.items()}
    wanted = list(dict.fromkeys(points()))
    taken: dict[Point, list[float]] = defaultdict(list)
    for turn in range(args.turns):
        for point in wanted:
            taken[point] += steps(engine, fleets[point.rank], point, turn)
    tiers.close()
    limits = machine(base.model.dtype)
    setup = {"quantization": args.quantization, "dtype": str(base.model.dtype)[6:], "lora_dtype": args.lora_dtype}
    setup |= {"threads": torch.get_num_threads(), **{name: round(value, 1) for name, value in limits.items()}}
    read_ms = {rank: size / limits["read_gb_s"] / 1e6 for rank, size in sizes.items()}
    bare = {point.rows: statistics.median(taken[point]) for point in wanted if not point.adapters}
    return [
        {
            **setup, "rows": point.rows, "adapters": point.adapters, "rank": point.rank,
            "step_ms": round(statistics.median(taken[point]) * 1e3, 2),
            "roofline_ms": round(1e3 * bare[point.rows] + point.adapters * read_ms[point.rank], 2),
        }
        for point in wanted
    ]  # fmt: skip


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Three panels: rows, adapters, ranks."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (by_rows, by_count, by_rank) = pyplot.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    of_16 = [r for r in records if r["rank"] == 16]
    bare = {r["rows"]: r["step_ms"] for r in of_16 if not r["adapters"]}
    own = {r["rows"]: r["step_ms"] for r in of_16 if r["adapters"] == min(r["rows"], FLEET_SIZE)}
    by_rows.plot(list(bare), list(bare.values()), "o-", label="bare base")
    by_rows.plot(list(own), list(own.values()), "o-", label="each row its own adapter (32 at most)")
    by_rows.set(xlabel="rows in the step", xscale="log", title="rows")
    counts = sorted((r["adapters"], r["step_ms"], r["roofline_ms"]) for r in of_16 if r["rows"] == 32)
    ranks = [(r["rank"], r["step_ms"], r["roofline_ms"]) for r in records if r["rows"] == 32 and r["adapters"] == 32]
    for axes, name, found in ((by_count, "adapters, rank 16, 32 rows", counts), (by_rank, "rank, 32 adapters", ranks)):
        at, measured, roofline = zip(*sorted(found), strict=True)
        axes.plot(at, measured, "o-", label="measured")
        axes.plot(at, roofline, "--", color="gray", label="bare base + memory's time for the weights")
        axes.set(xlabel=name.partition(",")[0], title=name)
    for axes, ticks in ((by_rows, ROWS), (by_count, (0, *COUNTS[2:])), (by_rank, RANKS)):
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(0)
        axes.set_ylabel("step, ms")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--fleet", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one for each point")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--quantization", default="none", choices=["none", "int8", "int4"])
    parser.add_argument("--lora-dtype", default="auto")
    args = parser.parse_args()
    records = measure(args)
    args.out.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    if args.plot:
        draw(records, args.plot)


if __name__ == "__main__":
    main()
