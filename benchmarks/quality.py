"""What rounding the base costs: perplexity of texts under each way of keeping it.

    python benchmarks/quality.py docs/lora.md docs/operations.md [--model MODEL] [--dtype float32] [--window 512]

The texts are cut into windows of so many tokens, each read by itself through the whole engine, so that what is measured
is what is served. Prints one JSON line per quantisation, with the share by which its perplexity exceeds the first's.
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, outside an installed checkout

from benchmarks.steps import Folders
from manylora.engine.build import EngineBuilder
from manylora.engine.engine import Engine
from manylora.engine.interface import SamplingParams
from manylora.engine.sequence import Sequence
from manylora.metrics import Metrics
from manylora.models.loading import load_base
from manylora.settings import load_settings

QUANTIZATIONS = ("none", "int8")


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
    args = parser.parse_args()
    text = "\n\n".join(path.read_text("utf-8") for path in args.texts)
    first: float | None = None
    for quantization in QUANTIZATIONS:
        settings = load_settings(model=args.model, quantization=quantization, dtype=args.dtype, kv_cache_memory=2**30)
        base = load_base(settings)
        ids = base.codec.encode(text)
        windows = [ids[at : at + args.window] for at in range(0, len(ids) - 1, args.window)]
        engine, tiers = EngineBuilder(settings, base).build_core(Folders(), Metrics())
        total, count = read_windows(engine, windows)
        tiers.close()
        perplexity = math.exp(-total / count)
        first = first or perplexity
        record = {
            "quantization": quantization,
            "dtype": str(base.model.dtype).removeprefix("torch."),
            "tokens": count,
            "perplexity": round(perplexity, 4),
            "above_first": round(perplexity / first - 1, 5),
        }
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
