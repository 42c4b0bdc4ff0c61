"""A full batch's answers by a mixture of experts (Qwen3-MoE's shape, about 1B random parameters), and transformers'.

    python benchmarks/experts.py [--rows 32] [--prompt 64] [--tokens 64] [--layers 16] [--rounds 3] [--dtype bfloat16]

The same prompts go through transformers' own `generate` and through the engine, greedily and to the same length, in
turns. One JSON line per round: tokens per second of either, all of prompts and answers' time included, and the ratio.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, outside an installed checkout

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from manylora.engine.build import EngineBuilder
from manylora.engine.engine import Engine
from manylora.engine.interface import SamplingParams
from manylora.engine.sequence import Sequence
from manylora.metrics import NoMetrics
from manylora.models import default_model
from manylora.models.loading import load_base
from manylora.settings import load_settings

_VOCAB = 151936


def write_mixture(folder: Path, layers: int) -> None:
    """A checkpoint in a new folder, with the default model's tokenizer, whose ids are fewer than the vocabulary's."""
    config = Qwen3MoeConfig(
        vocab_size=_VOCAB, hidden_size=1024, intermediate_size=3072, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=4, head_dim=64, num_experts=64, num_experts_per_tok=8, moe_intermediate_size=256,
        norm_topk_prob=True, max_position_embeddings=4096, tie_word_embeddings=True, eos_token_id=_VOCAB - 1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(default_model.ensure()).save_pretrained(folder)


def by_transformers(folder: Path, dtype: str, prompts: torch.Tensor, count: int) -> float:
    """Seconds that `generate` takes for the whole batch."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def run(count: int) -> None:
        mask = torch.ones_like(prompts)
        model.generate(
            input_ids=prompts, attention_mask=mask, do_sample=False, max_new_tokens=count, min_new_tokens=count
        )

    with torch.inference_mode():
        run(2)
        began = time.perf_counter()
        run(count)
        return time.perf_counter() - began


def by_engine(folder: Path, dtype: str, prompts: torch.Tensor, count: int) -> float:
    """Seconds that the engine takes for the same requests, given to it at once."""
    settings = load_settings(model=str(folder), dtype=dtype, max_model_len=2048, draft_tokens=0, prefix_cache=False)
    engine, tiers = EngineBuilder(settings, load_base(settings)).build_core(_NoAdapters(), NoMetrics())
    try:
        _run(engine, prompts[:2], 2)
        began = time.perf_counter()
        _run(engine, prompts, count)
        return time.perf_counter() - began
    finally:
        engine.close()
        tiers.close()


class _NoAdapters:
    def local_folder(self, ref: Any) -> Path:
        raise AssertionError(f"no request names {ref}")


def _run(engine: Engine, prompts: torch.Tensor, count: int) -> None:
    params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    for number, prompt in enumerate(prompts.tolist()):
        engine.add(Sequence(f"r{number}", prompt, params))
    while engine.has_work:
        engine.step()
        if not engine.made_progress:
            threading.Event().wait(0.001)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rows", 32), ("prompt", 64), ("tokens", 64), ("layers", 16), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    args = parser.parse_args()
    prompts = torch.randint(0, 20_000, (args.rows, args.prompt), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "mixture"
        write_mixture(folder, args.layers)
        for number in range(args.rounds):
            ways = (by_transformers, by_engine)
            seconds = {way: way(folder, args.dtype, prompts, args.tokens) for way in ways[:: -1 if number % 2 else 1]}
            made = args.rows * args.tokens
            line = {
                "record": "measurement", **vars(args), "round": number,
                "transformers_tps": round(made / seconds[by_transformers], 1),
                "engine_tps": round(made / seconds[by_engine], 1),
                "ratio": round(seconds[by_transformers] / seconds[by_engine], 2),
            }  # fmt: skip
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
