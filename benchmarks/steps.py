"""How long an engine step takes, by number of rows, with and without adapters.

    python benchmarks/steps.py MODEL --adapters DIR [--rows 1,8,32,64] [--kernels torch] [--workload]

Every adapter folder below DIR is loaded; row i of a decode step belongs to adapter i modulo their number. Prints one
JSON line per measurement: the median milliseconds of each phase, or for `--workload` the output tokens per second of 64
requests, 128 tokens in and 64 out, 32 at a time. `gemm_gflops` is the machine's bfloat16 rate in the same run.
"""

import argparse
import json
import random
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch

from manylora.engine.build import EngineBuilder
from manylora.engine.engine import Engine
from manylora.engine.interface import AdapterRef, SamplingParams
from manylora.engine.sequence import Sequence
from manylora.lora.memory.tiers import AdapterTiers
from manylora.metrics import Metrics
from manylora.models.loading import load_base
from manylora.settings import load_settings


class Phases(Metrics):
    """Keeps every step's times instead of a histogram."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def observe_step(self, phase: str, seconds: float) -> None:
        self.seconds[phase].append(seconds)


class Folders:
    """Adapters straight from folders."""

    def local_folder(self, ref: AdapterRef) -> Path:
        return Path(ref.name)


def gemm_gflops() -> float:
    """The bfloat16 rate of x[512, 576] @ w[576, 1536], best of many."""
    x, w = torch.randn(512, 576).bfloat16(), torch.randn(1536, 576).bfloat16()
    times = []
    for _ in range(60):
        began = time.perf_counter()
        torch.nn.functional.linear(x, w)
        times.append(time.perf_counter() - began)
    return 2 * 512 * 576 * 1536 / statistics.median(times) / 1e9


def sequence(number: int, refs: list[AdapterRef], num_prompt: int, num_output: int) -> Sequence:
    rng = random.Random(number)
    params = SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True)
    adapter = refs[number % len(refs)] if refs else None
    return Sequence(f"r{number}", [rng.randrange(1000, 40000) for _ in range(num_prompt)], params, adapter=adapter)


def measure_decode(engine: Engine, refs: list[AdapterRef], rows: int, phases: Phases, steps: int) -> dict[str, float]:
    seqs = [sequence(1000 * rows + i, refs, 128, steps + 8) for i in range(rows)]
    for seq in seqs:
        engine.add(seq)
    while any(s.num_output_tokens < 2 for s in seqs):
        engine.step()
    phases.seconds.clear()
    for _ in range(steps):
        engine.step()
    engine.abort(seqs)
    return {phase: round(statistics.median(times) * 1e3, 3) for phase, times in phases.seconds.items()}


def measure_workload(engine: Engine, refs: list[AdapterRef], seed: int, num_requests: int = 64) -> dict[str, float]:
    waiting = [sequence(10**6 * seed + i, refs, 128, 64) for i in range(num_requests)]
    began = time.perf_counter()
    for seq in waiting[:32]:
        engine.add(seq)
    waiting = waiting[32:]
    num_tokens = 0
    while engine.has_work:
        for output in engine.step():
            num_tokens += len(output.delta.token_ids)
            if output.delta.finish_reason is not None and waiting:
                engine.add(waiting.pop(0))
    return {"output_tokens_per_s": round(num_tokens / (time.perf_counter() - began), 1)}


def load_all(tiers: AdapterTiers, folders: list[Path], prefix: str = "id") -> list[AdapterRef]:
    refs = [AdapterRef(f"{prefix}{i}", "public", str(folder), 1, "") for i, folder in enumerate(folders)]
    for ref in refs:
        while tiers.acquire(ref) is None:
            time.sleep(0.005)
    return refs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--adapters", type=Path)
    parser.add_argument("--rows", default="1,8,32,64")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--kernels", default="auto", choices=["auto", "torch"])
    parser.add_argument("--quantization", default="none", choices=["none", "int8", "int4"])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--lora-dtype", default="auto")
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--workload", action="store_true")
    args = parser.parse_args()
    settings = load_settings(
        model=args.model,
        kernels=args.kernels,
        quantization=args.quantization,
        dtype=args.dtype,
        lora_dtype=args.lora_dtype,
        max_num_batched_tokens=args.max_num_batched_tokens,
    )
    phases = Phases()
    engine, tiers = EngineBuilder(settings, load_base(settings)).build_core(Folders(), phases)
    folders = sorted(p.parent for p in args.adapters.rglob("adapter_config.json")) if args.adapters else []
    refs = load_all(tiers, folders)
    setup = {
        "kernels": args.kernels,
        "quantization": args.quantization,
        "lora_dtypes": sorted({slab.layout.dtype for slab in tiers.memory.slabs.values()}),
        "adapters": len(refs),
        "threads": torch.get_num_threads(),
        "gemm_gflops": round(gemm_gflops()),
    }
    for rows in (int(r) for r in args.rows.split(",") if r):
        print(json.dumps({**setup, "rows": rows, **measure_decode(engine, refs, rows, phases, args.steps)}), flush=True)
    for seed in (1, 2) if args.workload else ():
        print(json.dumps({**setup, **measure_workload(engine, refs, seed)}), flush=True)
    tiers.close()


if __name__ == "__main__":
    main()
