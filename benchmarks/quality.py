"""What rounding the base and the KV cache costs: perplexity of texts under each way of keeping them.

    python benchmarks/quality.py docs/lora.md docs/operations.md [--model MODEL] [--dtype float32] [--window 512]
                                 [--out benchmarks/results/quality.jsonl]

The texts are cut into windows of so many tokens, each read by itself through the whole engine, so that what is measured
is what is served. Prints one JSON line for each way, with the share by which its perplexity exceeds the first's. A
checkpoint that was made of 4 bits in groups of 32 inputs, as the default model is, gets its own integers back; the last
way puts its inputs into groups that are half of one of its own and half of the next, and so shows what rounding without
data costs weights that may be any.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, outside an installed checkout

from benchmarks.steps import Folders
from manylora.engine.build import EngineBuilder
from manylora.engine.engine import Engine
from manylora.engine.interface import SamplingParams
from manylora.engine.sequence import Sequence
from manylora.kernels.matmul import BaseMatmul, int4
from manylora.kernels.weights import INT4_GROUP
from manylora.metrics import Metrics
from manylora.models.loading import LoadedBase, load_base
from manylora.settings import Settings, load_settings

WAYS: Final[Mapping[str, Mapping[str, str]]] = {
    "whole": {},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "whole, KV cache in int8": {"kv_cache_dtype": "int8"},
    "int4, KV cache in int8": {"quantization": "int4", "kv_cache_dtype": "int8"},
    "int4 in groups of its own": {"quantization": "int4"},
}
SHIFTED: Final = "int4 in groups of its own"


def loaded(settings: Settings, *, is_shifted: bool) -> LoadedBase:
    """The base, on request in groups that begin half a group later than the server's."""
    base = load_base(settings)
    return replace(base, backend=replace(base.backend, matmul=shifted)) if is_shifted else base


def shifted(weight: torch.Tensor, bias: torch.Tensor | None) -> BaseMatmul:
    by = INT4_GROUP // 2
    matmul = int4(weight.roll(by, 1), bias)
    return lambda x: matmul(x.roll(by, 1))


def read_windows(engine: Engine, windows: list[list[int]]) -> tuple[float, int]:
    """The sum of the log-probabilities of every token but each window's first, and their number."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    total, count = 0.0, 0
    for number, window in enumerate(windows):
        engine.add(Sequence(f"w{number}", window, params))
        while engine.has_work:
            for output in engine.step():
                known = [each.logprob for each in output.delta.prompt_logprobs if each.logprob is not None]
                total, count = total + sum(known), count + len(known)
    return total, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--out", type=Path, help="also write the lines here, after one that says how they came about")
    args = parser.parse_args()
    text = "\n\n".join(path.read_text("utf-8") for path in args.texts)
    records: list[dict[str, object]] = []
    first: float | None = None
    for way, options in WAYS.items():
        settings = load_settings(model=args.model, dtype=args.dtype, kv_cache_memory=2**30, **options)
        base = loaded(settings, is_shifted=way == SHIFTED)
        ids = base.codec.encode(text)
        windows = [ids[at : at + args.window] for at in range(0, len(ids) - 1, args.window)]
        engine, tiers = EngineBuilder(settings, base).build_core(Folders(), Metrics())
        total, count = read_windows(engine, windows)
        tiers.close()
        perplexity = math.exp(-total / count)
        first = first or perplexity
        records.append(
            {
                "record": "measurement",
                "kept_as": way,
                "dtype": str(base.model.dtype).removeprefix("torch."),
                "tokens": count,
                "perplexity": round(perplexity, 4),
                "above_first": round(perplexity / first - 1, 5),
            }
        )
        print(json.dumps(records[-1]), flush=True)
    if args.out:
        setup = {
            "record": "setup",
            "command": " ".join(["python", *sys.argv]),
            "model": args.model or "the default one",
        }
        lines = "".join(f"{json.dumps(record)}\n" for record in (setup, *records))
        args.out.write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
