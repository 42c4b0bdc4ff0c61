"""What a device makes of the programs for it: right first, then how fast beside what it can do at most.

    python -m benchmarks.device [--device cuda] [--out FILE] [--only lora,step] [--minutes 8]      # or: make gpu-check

Each part runs in a process of its own with a time limit, so one that fails stops no other. Every measured line is kept
beside the bytes or the operations it is compared to; the table comes last, and `--out` keeps the lines as JSON. Bases
are random, in the shapes of `benchmarks/bases.py` and the tests' tiny models; adapters are random, too. On a CPU the
same parts run in small sizes, which shows that the script works and says nothing about a GPU.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.bases import BASES, write_base
from benchmarks.steps import Folders, Phases, load_all, measure_decode, measure_workload
from manylora.engine.build import EngineBuilder
from manylora.engine.engine import Engine
from manylora.engine.interface import AdapterRef, SamplingParams
from manylora.engine.sequence import Sequence
from manylora.kernels.interface import SiteGroup, plan_of
from manylora.lora.memory.tiers import AdapterTiers
from manylora.models import default_model
from manylora.models.backends import choose, select_device
from manylora.models.loading import load_base
from manylora.settings import Settings, load_settings
from manylora_loadtest.fleet import make_fleet
from tests.kernels.lora_case import LoraCase, make_case
from tests.kernels.tolerance import assert_close
from tests.tiny_adapters import make_adapter
from tests.tiny_models import make_tiny_model

Line = dict[str, Any]
ARCHITECTURES: Final = ("llama", "qwen2", "qwen3", "gemma2", "mistral", "gpt2")
RANKS: Final = (8, 16, 64)
LARGE: Final = 2**33  # bytes of a device's memory from which on an 8B base fits beside its cache and adapters


def synchronised(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], object], device: torch.device, rounds: int = 20) -> float:
    """The median of `rounds` calls after three that are not counted, each until the device has ended it."""
    taken = []
    for number in range(rounds + 3):
        synchronised(device)
        began = time.perf_counter()
        run()
        synchronised(device)
        if number >= 3:
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def copy_rate(device: torch.device) -> float:
    """Bytes per second that are read and written when the device copies a large buffer."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)


def ceilings(device: torch.device) -> Iterator[Line]:
    """What the device does at most, which every other line is set beside."""
    size = 8192 if device.type == "cuda" else 512
    x, w = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    one = torch.zeros(1, device=device)
    yield {"what": "copy", "gb_s": copy_rate(device) / 1e9}
    yield {"what": f"matmul {size}", "tflops": 2 * size**3 / seconds_of(lambda: x @ w, device) / 1e12}
    yield {"what": "one small operation", "us": seconds_of(lambda: one.add_(1), device, 200) * 1e6}
    host = torch.zeros(2**26, dtype=torch.uint8)
    for name, source in (("pageable", host), *([("page-locked", host.pin_memory())] if device.type == "cuda" else [])):
        rate = source.nbytes / seconds_of(lambda source=source: source.to(device, copy=True), device)  # type: ignore[misc]
        yield {"what": f"copy from {name} memory of the host", "gb_s": rate / 1e9}


def right(device: torch.device) -> Iterator[Line]:
    """Deltas against float64, and whole models with adapters against the same engine on the CPU in torch operations."""
    kinds = [torch.float32, torch.int8, torch.bfloat16, torch.float16]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for ranks, weight_dtypes in (([1, 40, 3, 16, 64], []), ([8] * 8, kinds)):
            case = make_case(
                dtype, ranks, in_features=96, widths=(64, 40), rows=130, popularity="zipf", weight_dtypes=weight_dtypes
            ).to(device)
            actual = case.out.clone()
            group = SiteGroup(0, tuple(case.offsets), torch.tensor(case.offsets, dtype=torch.int32, device=device))
            plan = plan_of(
                choose(Settings(device=str(device))).lora, case.memory(device), case.row_slots.numpy().astype(np.int32)
            )
            assert plan is not None
            plan.add_(actual, case.x, group)
            assert_close(actual.cpu(), case.to(torch.device("cpu")).expected())
            yield {"what": "delta", "dtype": str(dtype), "ranks": str(ranks), "formats": len(weight_dtypes) or 1}
    with tempfile.TemporaryDirectory() as root:
        for architecture in ARCHITECTURES:
            base = make_tiny_model(architecture, Path(root) / architecture)
            folders = [make_adapter(base, Path(root) / f"{architecture}-{r}", rank=r, seed=r) for r in (2, 9)]
            found = [
                greedy(base, folders, name, kernels) for name, kernels in ((str(device), "auto"), ("cpu", "torch"))
            ]
            assert found[0] == found[1], f"{architecture}: {found}"
            yield {"what": "tokens of a whole model", "architecture": architecture, "tokens": sum(map(len, found[0]))}


def slots_of(case: LoraCase) -> np.ndarray:
    """Each row's, int32 [rows]."""
    return case.row_slots.numpy().astype(np.int32)


def greedy(base: Path, folders: list[Path], device: str, kernels: str) -> list[list[int]]:
    """The tokens that a mixed batch gets: the base, each adapter, prompts of several lengths."""
    engine, tiers, refs = opened(base, folders, device=device, kernels=kernels, dtype="float32")
    try:
        return mixed_batch(engine, [None, *refs])
    finally:
        engine.close()
        tiers.close()


def mixed_batch(engine: Engine, adapters: list[AdapterRef | None]) -> list[list[int]]:
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    prompts = [[3 + (7 * i + 5 * number) % 90 for i in range(5 + 11 * number)] for number in range(len(adapters))]
    seqs = [Sequence(f"r{n}", prompts[n], params, adapter=adapter) for n, adapter in enumerate(adapters)]
    for seq in seqs:
        engine.add(seq)
    while engine.has_work:
        engine.step()
    return [seq.tokens[seq.num_prompt_tokens :] for seq in seqs]


def opened(
    base: Path, folders: list[Path], phases: Phases | None = None, **options: Any
) -> tuple[Engine, AdapterTiers, list[AdapterRef]]:
    """An engine with these adapters on the device."""
    settings = load_settings(model=str(base), **options)
    engine, tiers = EngineBuilder(settings, load_base(settings)).build_core(Folders(), phases or Phases())
    return engine, tiers, load_all(tiers, folders)


def lora(device: torch.device) -> Iterator[Line]:
    """One group of linears: how near a decode step's deltas come to the time that their bytes take to be copied."""
    rate = copy_rate(device)
    kernel = choose(Settings(device=str(device))).lora
    is_gpu = device.type == "cuda"
    shapes = ((576, (576, 192, 192)), (4096, (4096, 1024, 1024)), (4096, (14336, 14336)))[: None if is_gpu else 1]
    for in_features, widths in shapes:
        for rank in RANKS:
            for rows, count in ((1, 1), (8, 8), (64, 8), (64, 64), (256, 64), (4096, 8))[: None if is_gpu else 3]:
                case = make_case(
                    torch.bfloat16, [rank] * count, in_features=in_features, widths=widths, rows=rows,
                    popularity="distinct" if rows == count else "uniform",
                ).to(device)  # fmt: skip
                memory = case.memory(device)
                group = SiteGroup(0, tuple(case.offsets), torch.tensor(case.offsets, dtype=torch.int32, device=device))
                plan = plan_of(kernel, memory, slots_of(case))
                assert plan is not None
                taken = seconds_of(lambda: plan.add_(case.out, case.x, group), device)  # noqa: B023 - called at once
                used = len(np.unique(slots_of(case)))
                num_bytes = 2 * (used * rank * (len(widths) * in_features + sum(widths)) + rows * sum(widths) * 2)
                yield {
                    "what": f"{in_features} to {'+'.join(map(str, widths))}", "rank": rank, "rows": rows,
                    "adapters": used, "us": taken * 1e6, "mib": num_bytes / 2**20,
                    "of_copy_rate": num_bytes / taken / rate,
                }  # fmt: skip


def step(device: torch.device) -> Iterator[Line]:
    """Whole engine steps: bare, one adapter for all rows, another for each; and a step beside its weights' bytes."""
    rate = copy_rate(device)
    is_gpu = device.type == "cuda"
    with tempfile.TemporaryDirectory() as root:
        for name, base in bases(Path(root), device):
            num_bytes = sum(file.stat().st_size for file in base.glob("*.safetensors"))
            count = 64 if is_gpu else 2
            folders = make_fleet(base, Path(root) / f"{name}-adapters", count, [16])
            phases = Phases()
            engine, tiers, refs = opened(base, folders, phases, device=str(device), max_num_seqs=256)
            for rows in (1, 8, 64, 256) if is_gpu else (1, 2):
                forward = {}
                for kind, used in (("bare", []), ("one", refs[:1]), ("mixed", refs)):
                    forward[kind] = measure_decode(engine, used, rows, phases, 30 if is_gpu else 3)["forward"]
                yield {
                    "what": name, "rows": rows, **{f"{kind}_ms": ms for kind, ms in forward.items()},
                    "mixed_over_bare": forward["bare"] / forward["mixed"],
                    "weights_of_copy_rate": num_bytes / rate / (forward["bare"] / 1e3),
                }  # fmt: skip
            engine.close()
            tiers.close()


def serve(device: torch.device) -> Iterator[Line]:
    """Requests that come and go, 32 at a time, by an engine without HTTP; how much of the time the host takes."""
    num_requests = 64 if device.type == "cuda" else 2
    with tempfile.TemporaryDirectory() as root:
        for name, base in bases(Path(root), device)[:1]:
            folders = make_fleet(base, Path(root) / f"{name}-adapters", 8, [16])
            phases = Phases()
            engine, tiers, refs = opened(base, folders, phases, device=str(device))
            for kind, used in (("bare", []), ("mixed", refs)):
                measure_workload(engine, used, 3, num_requests)  # programs are compiled when they are first launched
                phases.seconds.clear()
                found = measure_workload(engine, used, 4, num_requests)
                seconds = {phase: sum(times) for phase, times in phases.seconds.items()}
                yield {
                    "what": f"{name}, {kind}", **found,
                    "host_share": 1 - seconds.get("forward", 0.0) / sum(seconds.values()),
                }  # fmt: skip
            engine.close()
            tiers.close()


def bases(root: Path, device: torch.device) -> list[tuple[str, Path]]:
    """The default model, and on a device with room for it one of 8B parameters."""
    default = default_model.ensure()
    if device.type != "cuda" or torch.cuda.get_device_properties(device).total_memory < 3 * LARGE:
        return [("smollm2-135m", default)]
    large = "llama-3.1-8b"
    assert large in BASES
    if not (root / large).exists():
        write_base(large, root / large, default)
    return [("smollm2-135m", default), (large, root / large)]


PARTS: Final[Mapping[str, tuple[Callable[[torch.device], Iterator[Line]], float]]] = {
    "ceilings": (ceilings, 0.1), "right": (right, 0.2), "lora": (lora, 0.15),
    "step": (step, 0.4), "serve": (serve, 0.15),
}  # fmt: skip


def run_part(name: str, device: str, limit_s: float) -> list[Line]:
    """The part's lines, the last of which says how it ended if not well. Each reaches standard error as it comes."""
    command = [sys.executable, "-m", "benchmarks.device", "--device", device, "--part", name]
    began = time.perf_counter()
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=limit_s, check=False)
        said, ended = done.stdout, None if done.returncode == 0 else f"ended with {done.returncode}"
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode()
        ended = f"not done after {limit_s:.0f} s"
    lines = [{"part": name, **json.loads(line)} for line in said.splitlines() if line.startswith("{")]
    outcome = {"part": name, "seconds": round(time.perf_counter() - began, 1), "outcome": ended or "done"}
    return [*lines, outcome]


def table(lines: list[Line]) -> str:
    """A line of text for each, its numbers to three digits."""
    rows = []
    for line in lines:
        words = [f"{key} {value:.3g}" if isinstance(value, float) else f"{value}" for key, value in line.items()]
        rows.append("  ".join(words))
    return "\n".join(rows)


def about(device: torch.device) -> Line:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"part": "set-up", "device": name, "torch": torch.__version__, "cuda": torch.version.cuda}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to try the script")
    parser.add_argument("--out", type=Path, help="where the lines are kept")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = select_device(args.device)
    if args.part:
        for line in PARTS[args.part][0](device):
            print(json.dumps(line), flush=True)
        return 0
    wanted = args.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    share = sum(PARTS[name][1] for name in wanted)
    lines = [about(device)]
    for name in wanted:
        lines += run_part(name, args.device, 60 * args.minutes * PARTS[name][1] / share)
        print(table(lines[-1:]), file=sys.stderr)
    if args.out:
        args.out.write_text(json.dumps(lines, indent=1), encoding="utf-8")
    print(table(lines))
    return int(any(line.get("outcome", "done") != "done" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
