"""What adapters of other kinds cost beside plain LoRA, DoRA against LoRA, mixes against one adapter of their ranks.

    python -m benchmarks.kinds [MODEL] --out DIR --prepare                           # makes the adapters
    python -m benchmarks.kinds [MODEL] --out DIR [--rounds 3] [--only beside,dora,mixes,dense]

Adapters are made by PEFT, with random numbers, below DIR, one file of each kind; every one that is served has memory of
its own. Each line is a comparison of two fleets on the standard workload (64 requests, 128 tokens in and 64 out, 32 at
a time), run in turns (A B, B A, …) in one engine after a short run that does not count: the output tokens per second of
both, the ratio of each round and their median. Three rounds of the first three take five minutes on two cores.
"""

import argparse
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM

from benchmarks.steps import Folders
from manylora.engine.build import EngineBuilder
from manylora.engine.engine import Engine
from manylora.engine.interface import AdapterRef, Mix, SamplingParams
from manylora.engine.sequence import Sequence as EngineSequence
from manylora.lora.memory.tiers import AdapterTiers
from manylora.metrics import NoMetrics
from manylora.models.loading import load_base
from manylora.settings import load_settings

_LINEARS: Final = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_LORA: Final[Mapping[str, Any]] = {"r": 16, "lora_alpha": 16, "target_modules": _LINEARS}
_NEW_TOKENS: Final = 8
# By name: PEFT's method and its settings; with `rows`, the base is resized for tokens of the adapter's own.
KINDS: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "LoRA": ("LORA", _LORA),
    "LoRA, rank 8": ("LORA", {**_LORA, "r": 8}),
    "LoRA, rank 24": ("LORA", {**_LORA, "r": 24}),
    "DoRA": ("LORA", {**_LORA, "use_dora": True}),
    "LoRA with biases": ("LORA", {**_LORA, "lora_bias": True}),
    "LoRA with trained tokens": ("LORA", {**_LORA, "trainable_token_indices": list(range(100, 116))}),
    "LoRA with tokens of its own": ("LORA", _LORA),
    "LoRA with saved norms": ("LORA", {**_LORA, "modules_to_save": ["input_layernorm", "norm"]}),
    "AdaLoRA": ("ADALORA", {"init_r": 16, "target_r": 8, "total_step": 10, "target_modules": _LINEARS}),
    "IA3": ("IA3", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "LN tuning": ("LN_TUNING", {"target_modules": ["input_layernorm", "post_attention_layernorm", "norm"]}),
    "VeRA": ("VERA", {"r": 16, "target_modules": ["q_proj", "o_proj"]}),
    "Prompt tuning": ("PROMPT_TUNING", {"num_virtual_tokens": 8}),
    "OFT": ("OFT", {"oft_block_size": 16, "target_modules": _LINEARS}),
    "LoRA with a saved head": ("LORA", {**_LORA, "modules_to_save": ["lm_head"]}),
}
LIGHT: Final = (
    "DoRA", "LoRA with biases", "LoRA with trained tokens", "LoRA with tokens of its own", "LoRA with saved norms",
    "AdaLoRA", "IA3", "LN tuning", "VeRA", "Prompt tuning",
)  # fmt: skip
DENSE: Final = ("OFT", "LoRA with a saved head")  # each reads matrices as large as the base's own for its rows
Fleet = Sequence[AdapterRef | Mix]
_seeds = itertools.count()  # no prompt comes twice, so none is found in the prefix cache


def make(base: Path, out: Path, kind: str) -> Path:
    """PEFT's own files of an adapter of this kind; those that are there already are left alone."""
    folder = out / kind.replace(" ", "-").replace(",", "")
    if (folder / "adapter_config.json").exists():
        return folder
    method, settings = KINDS[kind]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        if kind == "LoRA with tokens of its own":
            model.resize_token_embeddings(model.config.vocab_size + _NEW_TOKENS)
        config: PeftConfig = PEFT_TYPE_TO_CONFIG_MAPPING[method](task_type="CAUSAL_LM", **settings)
        tuned = get_peft_model(model, config)
        with torch.no_grad():
            for weight in tuned.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn_like(weight) * 0.01)
        tuned.save_pretrained(folder)
    return folder


def load(tiers: AdapterTiers, folder: Path, count: int) -> list[AdapterRef]:
    """`count` adapters of these files, each with memory of its own, on the device."""
    virtual = json.loads((folder / "adapter_config.json").read_text()).get("num_virtual_tokens") or 0
    refs = [AdapterRef(f"{folder.name}-{n}", "public", str(folder), 1, "", virtual) for n in range(count)]
    for ref in refs:
        while tiers.acquire(ref) is None:
            time.sleep(0.005)
    return refs


def tokens_per_s(engine: Engine, fleet: Fleet, seed: int, *, num_requests: int = 64, num_tokens: int = 64) -> float:
    """Of the standard workload, whose requests name the fleet's adapters in turn."""
    random = torch.Generator().manual_seed(seed)
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    waiting = [
        EngineSequence(
            f"{seed}-{n}",
            torch.randint(1000, 40000, (128,), generator=random).tolist(),
            params,
            adapter=fleet[n % len(fleet)],
        )
        for n in range(num_requests)
    ]
    began = time.perf_counter()
    for seq in waiting[:32]:
        engine.add(seq)
    waiting = waiting[32:]
    given = 0
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            given += len(output.delta.token_ids)
            if output.delta.finish_reason is not None and waiting:
                engine.add(waiting.pop(0))
    return given / (time.perf_counter() - began)


def compare(engine: Engine, what: str, a: Fleet, b: Fleet, rounds: int, least: float | None) -> None:
    """B over A, in turns, after a short run of each that does not count."""
    for fleet in (a, b):
        tokens_per_s(engine, fleet, next(_seeds), num_requests=32, num_tokens=4)
    rates = []
    for number in range(rounds):
        found = {}
        for name, fleet in (("a", a), ("b", b)) if number % 2 == 0 else (("b", b), ("a", a)):
            found[name] = tokens_per_s(engine, fleet, next(_seeds))
        rates.append((found["a"], found["b"]))
    ratios = [second / first for first, second in rates]
    say = {
        "what": what,
        "a_tokens_per_s": [round(first, 1) for first, _ in rates],
        "b_tokens_per_s": [round(second, 1) for _, second in rates],
        "ratios": [round(ratio, 3) for ratio in ratios],
        "median": round(statistics.median(ratios), 3),
        "at_least": least,
    }
    print(json.dumps(say), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="the base; the default model when left out")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapters")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="beside,dora,mixes")
    parser.add_argument("--prepare", action="store_true", help="only make the adapters")
    args = parser.parse_args()
    wanted = set(args.only.split(","))
    settings = load_settings(model=args.model, max_slots=256, adapter_memory=8 * 2**30, host_tier_memory=2**30)
    base = load_base(settings)
    folders = {kind: make(base.folder, args.out, kind) for kind in KINDS if kind not in DENSE or "dense" in wanted}
    if args.prepare:
        return
    engine, tiers = EngineBuilder(settings, base).build_core(Folders(), NoMetrics())
    plain = load(tiers, folders["LoRA"], 32)
    if "beside" in wanted:
        others = [ref for kind in LIGHT for ref in load(tiers, folders[kind], 2)][:16]
        mixed = [ref for pair in zip(plain[:16], others, strict=True) for ref in pair]
        compare(engine, "16 LoRA beside 16 of ten other kinds, over 32 LoRA", plain, mixed, args.rounds, 0.97)
    if "dora" in wanted:
        dora = load(tiers, folders["DoRA"], 34)[2:]
        compare(engine, "32 DoRA over 32 LoRA of the same rank", plain, dora, args.rounds, 0.85)
    if "mixes" in wanted:
        parts = load(tiers, folders["LoRA, rank 8"], 64)
        mixes = [Mix.weighted((parts[(n * 7 + k * 19) % 64], 0.5 + 0.1 * k) for k in range(3)) for n in range(32)]
        summed = load(tiers, folders["LoRA, rank 24"], 32)
        compare(engine, "32 mixes of 3 of rank 8 over 32 LoRA of rank 24", summed, mixes, args.rounds, 1 / 1.1)
    if "dense" in wanted:
        for kind in DENSE:
            some = [*plain[:30], *load(tiers, folders[kind], 2)]
            compare(engine, f"30 LoRA beside 2 of {kind} over 32 LoRA", plain, some, args.rounds, None)
    tiers.close()


if __name__ == "__main__":
    main()
