"""Embeddings of many adapters in one batch, beside the same texts adapter after adapter.

    python -m benchmarks.encoders MODEL --adapters DIR [--make 32] [--texts 4] [--length 32] [--rounds 5]

MODEL is an encoder of texts, such as all-minilm-l6-v2, and DIR holds folders of adapters on it, say 32; `--make N` has
PEFT draw so many, of rank 8 on query and value, into DIR first. Each adapter has `--texts` texts of `--length` tokens.
In turns, since times on a shared machine drift, all of them run together, then one adapter's at a time, then all on the
bare base together. Prints a JSON line for each round, with texts per second, and one with the medians of the ratios:
`mixed_ratio`, together over one adapter at a time; `base_ratio`, together over the bare base.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

from benchmarks.steps import Folders, load_all
from manylora.engine.engine import Engine
from manylora.engine.interface import AdapterRef, SamplingParams
from manylora.engine.pool_build import PoolBuilder
from manylora.engine.sequence import Sequence
from manylora.metrics import Metrics
from manylora.models.encoder_loading import load_encoder
from manylora.models.loading import resolve_model
from manylora.settings import load_settings


def make_adapters(model: Path, out: Path, count: int) -> None:
    """Folders of PEFT's with random weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    for number in range(count):
        torch.manual_seed(number)
        tuned = get_peft_model(
            AutoModel.from_pretrained(model),
            LoraConfig(task_type="FEATURE_EXTRACTION", r=8, target_modules=["query", "value"], init_lora_weights=False),
        )
        tuned.save_pretrained(out / f"random-{number:03}")


def texts(num_texts: int, length: int, vocab_size: int) -> list[list[int]]:
    """Token ids, any of them."""
    chance = random.Random(0)
    return [[chance.randrange(vocab_size) for _ in range(length)] for _ in range(num_texts)]


def texts_per_second(
    engine: Engine, groups: list[tuple[AdapterRef | None, list[list[int]]]], *, together: bool
) -> float:
    """All texts, the groups in one queue or one after the other."""
    number, params = time.monotonic_ns(), SamplingParams(max_tokens=0, pooling="mean")
    began = time.perf_counter()
    for ref, rows in groups:
        for row in rows:
            number += 1
            engine.add(Sequence(f"r{number}", list(row), params, adapter=ref))
        while engine.has_work and not together:
            engine.step()
    while engine.has_work:
        engine.step()
    return sum(len(rows) for _, rows in groups) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--make", type=int, default=0)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    folder = resolve_model(args.model)
    if args.make:
        make_adapters(folder, args.adapters, args.make)
    folders = sorted(path.parent for path in args.adapters.rglob("adapter_config.json"))
    settings = load_settings(model=args.model, max_slots=max(1, len(folders)))
    builder = PoolBuilder(settings, load_encoder(settings, folder))
    engine, tiers = builder.build_core(Folders(), Metrics())
    refs = load_all(tiers, folders)
    rows = texts(args.texts * len(refs), args.length, builder.encoder.vocab_size)
    groups: list[tuple[AdapterRef | None, list[list[int]]]] = [
        (ref, rows[number * args.texts :][: args.texts]) for number, ref in enumerate(refs)
    ]
    rounds = []
    for number in range(args.rounds + 1):
        found = {
            "together": texts_per_second(engine, groups, together=True),
            "in_turn": texts_per_second(engine, groups, together=False),
            "base": texts_per_second(engine, [(None, rows)], together=True),
        }
        if number:  # the first one warms up
            rounds.append(found)
            print(json.dumps({"adapters": len(refs), **{k: round(v, 1) for k, v in found.items()}}), flush=True)
    ratios = {
        name: round(statistics.median(each["together"] / each[below] for each in rounds), 3)
        for name, below in (("mixed_ratio", "in_turn"), ("base_ratio", "base"))
    }
    print(json.dumps(ratios), flush=True)
    engine.close()
    tiers.close()


if __name__ == "__main__":
    main()
