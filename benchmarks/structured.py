"""What it costs to hold every row of a batch to a grammar of its own, and what tokens that must come save.

    python benchmarks/structured.py MODEL [--adapters DIR] [--rows 32] [--tokens 64] [--rounds 5]

Rounds alternate, since times on a shared machine drift: the same rows without grammars, with a JSON schema each, and
with the same schemas but one token at a time. Prints a JSON line for each round and one with the medians of the ratios:
`step_ratio`, the time of a decode step without over that with grammars, one token at a time (1: masks cost nothing);
`speed_ratio`, output tokens per second with grammars over those without; `forced_ratio`, with grammars over one at a
time. `sample_ms`: the median of a step's sampling, in which masks are waited for and laid over the logits.
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.steps import Folders, Phases, load_all, sequence
from manylora.engine.build import EngineBuilder
from manylora.engine.engine import Engine
from manylora.engine.interface import AdapterRef, SamplingParams
from manylora.grammars.compiler import Compiled, GrammarCompiler
from manylora.grammars.grammar import Grammar, Whitespace
from manylora.grammars.vocabulary import Vocabulary
from manylora.models.loading import LoadedBase, load_base
from manylora.settings import load_settings


def schema(row: int) -> dict[str, Any]:
    """Long enough for any number of tokens, and another one for each row."""
    order = {
        "type": "object",
        "properties": {
            f"customer_{row}": {"type": "string", "maxLength": 12 + row},
            "quantity": {"type": "integer", "minimum": 1, "maximum": 99 + row},
            "kind": {"enum": ["coffee", "tea", f"special {row}"]},
            "is_paid": {"type": "boolean"},
        },
        "required": [f"customer_{row}", "quantity", "kind", "is_paid"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": order, "minItems": 500}


def compile_all(base: LoadedBase, rows: int) -> list[Compiled]:
    codec = base.codec
    compiler = GrammarCompiler(
        lambda: Vocabulary(codec.compiled_json(), base.config.vocab_size, tuple(codec.eos_ids)),
        partial(codec.encode, add_special_tokens=False),
        2**30,
    )
    whitespace = Whitespace(separators=(", ", ": "))
    made = [
        compiler.compile(Grammar.json_schema(schema(row), whitespace), f"tenant {row}").result() for row in range(rows)
    ]
    compiler.close()
    return made


def measure(
    engine: Engine, refs: list[AdapterRef], phases: Phases, grammars: list[Compiled | None], how: dict[str, Any]
) -> dict[str, float]:
    """Output tokens per second of one batch from its first decode step on, and the medians of a step's parts in ms."""
    number = int(time.monotonic_ns() % 10**9)
    seqs = [sequence(number + row, refs, 128, how["tokens"]) for row in range(len(grammars))]
    for seq, grammar in zip(seqs, grammars, strict=True):
        seq.params = SamplingParams(
            max_tokens=how["tokens"],
            temperature=0.0,
            ignore_eos=True,
            grammar=grammar,
            logprobs=0 if how["one_by_one"] else None,
        )
        engine.add(seq)
    while any(not seq.num_output_tokens for seq in seqs):
        engine.step()
    before = sum(seq.num_output_tokens for seq in seqs)
    phases.seconds.clear()
    began = time.perf_counter()
    while engine.has_work:
        engine.step()
    seconds = time.perf_counter() - began
    made = sum(seq.num_output_tokens for seq in seqs) - before
    in_ms = {phase: statistics.median(times) * 1e3 for phase, times in phases.seconds.items()}
    return {
        "tokens_per_s": round(made / seconds, 1),
        "step_ms": round(sum(in_ms.values()), 3),
        "sample_ms": round(in_ms["sample"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--adapters", type=Path)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quantization", default="none", choices=["none", "int8", "int4"])
    args = parser.parse_args()
    settings = load_settings(model=args.model, quantization=args.quantization)
    base, phases = load_base(settings), Phases()
    engine, tiers = EngineBuilder(settings, base).build_core(Folders(), phases)
    folders = sorted(p.parent for p in args.adapters.rglob("adapter_config.json")) if args.adapters else []
    refs = load_all(tiers, folders)
    grammars: list[Compiled | None] = [*compile_all(base, args.rows)]
    ways: dict[str, tuple[list[Compiled | None], bool]] = {
        "free": ([None] * args.rows, False),
        "free_scored": ([None] * args.rows, True),
        "held": (grammars, False),
        "one_by_one": (grammars, True),
    }
    rounds = []
    for number in range(args.rounds + 1):
        found = {
            name: measure(engine, refs, phases, held, {"tokens": args.tokens, "one_by_one": one_by_one})
            for name, (held, one_by_one) in ways.items()
        }
        if number:  # the first one warms up
            rounds.append(found)
            print(json.dumps({"rows": args.rows, "adapters": len(refs), **found}), flush=True)

    def median(above: str, below: str, of: str) -> float:
        return round(statistics.median(each[above][of] / each[below][of] for each in rounds), 3)

    ratios = {
        "step_ratio": median("free_scored", "one_by_one", "step_ms"),
        "speed_ratio": median("held", "free", "tokens_per_s"),
        "forced_ratio": median("held", "one_by_one", "tokens_per_s"),
    }
    print(json.dumps(ratios), flush=True)
    engine.close()
    tiers.close()


if __name__ == "__main__":
    main()
