"""Runs the scenario `soak` on a server of its own: an hour of everything at once, after which nothing may have grown.

    python benchmarks/soak.py --out results/ [--duration-s 3600] [--rate 1.5] [--model MODEL_DIR]

60 random adapters over 16 slots; three tenants with keys; uploads, promotions, damaged uploads, deletions; a tenth of
the requests is to be refused, a tenth is left by its client. Once a second the server's memory, files, threads, blocks
and slots are noted. The exit code says whether every threshold of the scenario held and the server ended in good order.
"""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, outside an installed checkout

from benchmarks.servers import Server, end_on_sigterm, free_port
from manylora.database.database import open_database
from manylora.settings import load_settings
from manylora.tenants.interface import Role
from manylora.tenants.keys import KeyStore
from manylora_loadtest.fleet import make_fleet
from manylora_loadtest.record import write_run
from manylora_loadtest.report import write_report
from manylora_loadtest.runner import run_scenario
from manylora_loadtest.scenario import LiveChange, Scenario, find_scenario, load_scenario
from manylora_loadtest.summary import Summary, summarise

NUM_ADAPTERS = 60
NUM_SLOTS = 16
RANKS = (4, 8, 16)
# Memory for adapters, and for keys and values, is full after the warm-up already: what grows then is something else.
LIMITS = (
    "--max-slots", str(NUM_SLOTS), "--max-num-seqs", str(NUM_SLOTS), "--adapter-memory", "96MiB",
    "--host-tier-memory", "96MiB", "--kv-cache-memory", "64MiB", "--max-model-len", "2048",
)  # fmt: skip
START_S = 300.0
KEYS = {"acme": ("acme", Role.MANAGER), "rival": ("rival", Role.MANAGER), "ops": ("public", Role.ADMIN)}


def soak(out: Path, model: Path, *, duration_s: float, rate: float, flags: Sequence[str] = ()) -> tuple[Summary, int]:
    """Runs it in `out`; returns what it showed, and the server's exit status after SIGTERM."""
    out.mkdir(parents=True, exist_ok=True)
    data = out / "data"
    make_fleet(model, out / "fleet", NUM_ADAPTERS, RANKS)
    spare = make_fleet(model, out / "spare", 3, RANKS, pattern="b{}", seed=2)
    keys = make_keys(data)
    port = free_port()
    command = [
        sys.executable, "-m", "manylora", "serve", str(model), "--served-name", "base", "--port", str(port),
        "--adapters", str(out / "fleet"), "--data-dir", str(data), *LIMITS, *flags,
    ]  # fmt: skip
    server = Server("manylora", command, f"http://127.0.0.1:{port}", out / "server.log", "/ready")
    server.start(START_S)
    try:
        scenario = scenario_of(spare, duration_s=duration_s, rate=rate)
        os.environ |= {f"LOADTEST_KEY_{name.upper()}": key for name, key in keys.items()}
        run = asyncio.run(run_scenario(scenario, server.url, metrics_key=keys["ops"], pid=server.pid))
    finally:
        status = server.end(signal.SIGTERM)
    summary = summarise(run)
    write_run(out / "results.jsonl", run, summary)
    write_report(out / "report.html", run, summary)
    return summary, status


def make_keys(data: Path) -> dict[str, str]:
    """A key for each of the scenario's tenants, in a new database."""
    database = open_database(load_settings(data_dir=data).resolved_database_url)
    try:
        return {name: KeyStore(database).create(tenant, role)[1] for name, (tenant, role) in KEYS.items()}
    finally:
        database.close()


def scenario_of(folders: Sequence[Path], *, duration_s: float, rate: float) -> Scenario:
    """The ready scenario with these adapters to upload, at this rate."""
    scenario = load_scenario(find_scenario("soak"))
    assert scenario.arrival is not None

    def with_folders(change: LiveChange) -> LiveChange:
        return change.model_copy(update={"folders": tuple(folders[: len(change.folders)])})

    arrival = scenario.arrival.model_copy(update={"duration_s": duration_s, "rate": (rate,)})
    return scenario.model_copy(update={"arrival": arrival, "changes": tuple(map(with_folders, scenario.changes))})


def lines_of(summary: Summary) -> list[str]:
    """What a reader wants to know first."""
    lines = [
        f"{summary.totals.requests} requests, {dict(summary.totals.outcomes)}; {summary.num_changes} changes, "
        f"{summary.num_failed_changes} failed; {summary.server}"
    ]
    for threshold in summary.thresholds:
        verdict = "passed" if threshold.is_passed else "FAILED"
        lines.append(f"{verdict}  {threshold.name} {threshold.actual} (limit {threshold.limit:g})")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; the embedded default if left out")
    parser.add_argument("--duration-s", type=float, default=3600)
    parser.add_argument("--rate", type=float, default=1.5, help="requests per second")
    options = parser.parse_args()
    end_on_sigterm()
    from manylora.models.default_model import ensure

    summary, status = soak(options.out, options.model or ensure(), duration_s=options.duration_s, rate=options.rate)
    print("\n".join([*lines_of(summary), f"the server ended with status {status}"]))
    return 0 if summary.is_passed and status == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
