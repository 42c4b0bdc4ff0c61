"""Random adapters in PEFT layout: something to load a server with when there are no trained ones."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from manylora_loadtest.errors import ScenarioError

__all__ = ["make_fleet"]

_MODULES: Final = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
_B_SCALE: Final = 0.01  # enough to change most answers, little enough to keep them finite


def make_fleet(
    model: Path,
    out: Path,
    count: int,
    ranks: Sequence[int],
    *,
    pattern: str = "a{:03d}",
    seed: int = 1,
    b_scale: float = _B_SCALE,
) -> list[Path]:
    """Writes `count` bfloat16 adapters on the linears of all layers, ranks taken in turn; returns their folders.

    `b_scale`: of B's entries, so how much an adapter changes. A folder that is already there is left alone. Raises
    ScenarioError when the model has no such linears.
    """
    import torch

    shapes = _linear_shapes(model)
    if not shapes:
        raise ScenarioError(f"{model} has no safetensors with linears called {', '.join(_MODULES)}")
    folders = []
    for number in range(count):
        folder = out / pattern.format(number)
        folders.append(folder)
        if (folder / "adapter_config.json").exists():
            continue
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        _write_adapter(folder, model, shapes, ranks[number % len(ranks)], generator, b_scale)
    return folders


def _write_adapter(
    folder: Path, model: Path, shapes: dict[str, tuple[int, int]], rank: int, generator: object, b_scale: float
) -> None:
    import torch
    from safetensors.torch import save_file

    assert isinstance(generator, torch.Generator)
    tensors = {}
    for path, (num_in, num_out) in shapes.items():
        stem = f"base_model.model.{path}"
        a = torch.randn(rank, num_in, generator=generator) / num_in**0.5
        b = torch.randn(num_out, rank, generator=generator) * b_scale
        tensors[f"{stem}.lora_A.weight"] = a.bfloat16()
        tensors[f"{stem}.lora_B.weight"] = b.bfloat16()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model.name, "r": rank,
        "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "target_modules": sorted({path.rpartition(".")[2] for path in shapes}), "modules_to_save": None,
        "use_rslora": False, "use_dora": False,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _linear_shapes(model: Path) -> dict[str, tuple[int, int]]:
    """Module path -> (in features, out features), from the checkpoint's headers alone."""
    from safetensors import safe_open

    shapes = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                path, _, kind = name.rpartition(".")
                if kind == "weight" and path.rpartition(".")[2] in _MODULES:
                    num_out, num_in = tensors.get_slice(name).get_shape()
                    shapes[path] = (num_in, num_out)
    return shapes
