"""Writes a base of random weights in the shape of a model that people run, to measure what its size costs.

    python benchmarks/bases.py qwen2.5-1.5b FOLDER [--tokenizer MODEL_FOLDER]

The tokenizer is the default model's unless told, whose ids are fewer than the vocabulary's. Weights are written layer
by layer in bfloat16, a file each, so no more than a layer is in memory. With `--loading` a folder is loaded and wrapped
as a server does it, and one JSON line says what memory that took at its peak:

    python benchmarks/bases.py --loading FOLDER [--quantization int4]

`anonymous_peak` is memory that only the process could give back; the weights' file is mapped, and its pages are the
system's to drop. `kept` is the base in the format that it is served in.
"""

import argparse
import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, outside an installed checkout

import psutil
import torch
from safetensors.torch import save_file

from manylora.models import default_model

_QWEN: Final[Mapping[str, Any]] = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936, "rope_theta": 1e6,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "hidden_act": "silu", "tie_word_embeddings": True,
    "dtype": "bfloat16",
}  # fmt: skip
_LLAMA: Final[Mapping[str, Any]] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "rope_theta": 5e5,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "hidden_act": "silu", "tie_word_embeddings": True,
    "dtype": "bfloat16",
}  # fmt: skip


def _shape(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim,
    }  # fmt: skip


BASES: Final[Mapping[str, dict[str, Any]]] = {
    "qwen2.5-0.5b": {**_QWEN, **_shape(24, 896, 4864, 14, 2, 64)},
    "qwen2.5-1.5b": {**_QWEN, **_shape(28, 1536, 8960, 12, 2, 128)},
    "llama-3.2-1b": {**_LLAMA, **_shape(16, 2048, 8192, 32, 8, 64)},
    "llama-3.1-8b": {**_LLAMA, **_shape(32, 4096, 14336, 32, 8, 128), "tie_word_embeddings": False},
}


def write_base(name: str, folder: Path, tokenizer: Path) -> None:
    """A checkpoint of random weights in the shape `name`, in a new folder."""
    config, random = BASES[name], torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(_files(config)):
        file = f"model-{number:05}.safetensors"
        made = {
            key: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else (torch.randn(shape, generator=random) / shape[1] ** 0.5).bfloat16()
            for key, shape in tensors.items()
        }
        save_file(made, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(made, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for path in (*tokenizer.glob("tokenizer*"), *tokenizer.glob("*.jinja")):
        shutil.copyfile(path, folder / path.name)


def _files(config: Mapping[str, Any]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes, a file at a time."""
    hidden, inner, width = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    outer = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    yield outer if config["tie_word_embeddings"] else outer | {"lm_head.weight": (config["vocab_size"], hidden)}
    has_bias = config["model_type"] == "qwen2"
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        sizes = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
        found: dict[str, tuple[int, ...]] = {f"{at}.self_attn.{n}_proj.weight": size for n, size in sizes.items()}
        if has_bias:
            found |= {f"{at}.self_attn.{n}_proj.bias": sizes[n][:1] for n in "qkv"}
        mlp = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        found |= {f"{at}.mlp.{n}_proj.weight": size for n, size in mlp.items()}
        yield found | {f"{at}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}


def measure_loading(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Load and wrap the base as a server does, and tell the memory's peak beside what is kept."""
    from manylora.engine.build import EngineBuilder
    from manylora.models.loading import load_base
    from manylora.models.memory_report import memory_report
    from manylora.settings import load_settings

    settings = load_settings(model=str(folder), **options)
    told, before, peaks, ended = memory_report(settings), _memory(), [0, 0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            peaks[:] = [max(peak, now - start) for peak, now, start in zip(peaks, _memory(), before, strict=True)]

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    builder = EngineBuilder(settings, load_base(settings))
    taken = time.perf_counter() - began
    ended.set()
    watcher.join()
    assert builder.modules
    return {
        "record": "measurement", "base": folder.name, **options, "kept": told.base, "anonymous_peak": peaks[0],
        "resident_peak": peaks[1], "anonymous_over_kept": round(peaks[0] / told.base, 3), "seconds": round(taken, 1),
    }  # fmt: skip


def _memory() -> tuple[int, int]:
    """Bytes of this process that no file backs, and all that are in memory."""
    found = psutil.Process().memory_info()
    return found.rss - found.shared, found.rss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", choices=list(BASES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--loading", action="store_true", help="load what is in the folder")
    parser.add_argument("--quantization", default="int4", choices=["none", "int8", "int4"])
    args = parser.parse_args()
    if args.loading:
        print(json.dumps(measure_loading(args.folder, {"quantization": args.quantization})), flush=True)
    elif args.base is None:
        parser.error("name a base, or give --loading")
    else:
        write_base(args.base, args.folder, args.tokenizer or default_model.ensure())


if __name__ == "__main__":
    main()
