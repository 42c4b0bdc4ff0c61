"""`manylora merge`: adapters into the base as an ordinary checkpoint, or several adapters into one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from manylora.errors import InvalidRequest
from manylora.lifecycle.base import Base, load_base
from manylora.lifecycle.output import result_and_report, safetensors_as_os_errors, write_json
from manylora.lifecycle.progress import Listener, Progress, ignore
from manylora.lifecycle.weights.compress import chosen_dtype
from manylora.lifecycle.weights.deltas import (
    REPORT,
    MergeConfig,
    check,
    check_one_base,
    delta_of,
    parse_adapter,
    paths_of,
    unmerged,
    verify,
)
from manylora.lifecycle.weights.low_rank import Lora, applied, read_lora
from manylora.lifecycle.weights.merge_adapters import into_adapter
from manylora.lifecycle.weights.probes import logits_of
from manylora.models.stages import quiet

__all__ = ["MergeConfig", "merge", "parse_adapter"]


def merge(config: MergeConfig, *, overwrite: bool = False, listen: Listener = ignore) -> dict[str, Any]:
    """Write the checkpoint or adapter and, beside it, the report, which is returned.

    Raises InvalidRequest or InvalidAdapter for bad input, before a model is loaded where that is possible.
    """
    check(config, overwrite=overwrite)
    loras = [read_lora(folder) for folder, _ in config.adapters]
    check_one_base(loras, config)
    report: dict[str, Any] = {
        "adapters": [f"{folder.name}:{weight:g}" for folder, weight in config.adapters],
        "method": config.method,
    }
    if config.into_base:
        _into_base(config, report, listen)
    else:
        into_adapter(config, loras, report, listen)
    return report


def _into_base(config: MergeConfig, report: dict[str, Any], listen: Listener) -> None:
    from manylora.models.wrapping import adaptable_modules

    base = load_base(config.base, device="cpu", dtype="float32")
    modules = adaptable_modules(base.model)
    loras = [read_lora(folder, modules) for folder, _ in config.adapters]
    paths = paths_of(loras)
    _check_tied(base, paths)
    _compare_names(base, loras, listen)
    before = logits_of(base.model, base.tokenizer)
    deltas = {}
    for done, path in enumerate(paths, start=1):
        deltas[path] = delta_of(config, loras, path)
        listen(Progress("merge", done, len(paths)))
    with applied(base.model, unmerged(config, loras, deltas)):
        wanted = logits_of(base.model, base.tokenizer)
    _add(base, deltas, {path: modules[path].kind for path in paths})
    dtype = chosen_dtype(config.dtype, base.stored_dtype)
    report |= {"base": base.name, "dtype": str(dtype).removeprefix("torch."), "num_modules": len(paths)}
    with result_and_report(config.out) as (result, beside):
        _save(base, result, dtype)
        listen(Progress("verify", message="Reading the checkpoint back to compare it with base + adapter"))
        found = logits_of(load_base(str(result), device="cpu", dtype="float32").model, base.tokenizer)
        verify(report, before, wanted, found, listen)
        write_json(beside / REPORT, report)


def _compare_names(base: Base, loras: Sequence[Lora], listen: Listener) -> None:
    for lora in loras:
        named = lora.base_name
        if named and Path(named).name.lower() != Path(base.name).name.lower():
            message = f"An adapter names {named} as its base, and it is merged into {base.name}."
            listen(Progress("warning", message=message))


def _check_tied(base: Base, paths: Sequence[str]) -> None:
    """An adapted head that shares its weight with the embedding cannot be merged without changing both."""
    head = base.model.get_output_embeddings()
    embedding = base.model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    tied = {path for path, module in base.model.named_modules() if module is head or module is embedding}
    touched = sorted(tied & set(paths))
    if touched:
        raise InvalidRequest(
            f"This base ties its head to its embedding, and the adapter changes {', '.join(touched)}: merged, it would "
            "change both. Serve it as an adapter, or drop these modules."
        )


@torch.no_grad()
def _add(base: Base, deltas: Mapping[str, torch.Tensor], kinds: Mapping[str, str]) -> None:
    for path, delta in deltas.items():
        weight = base.model.get_submodule(path).weight
        # a linear keeps [out, in]; Conv1D and an embedding keep the transpose of ΔW
        weight.add_(delta if kinds[path] == "linear" else delta.T)


def _save(base: Base, folder: Path, dtype: torch.dtype) -> None:
    with quiet(), safetensors_as_os_errors("the checkpoint"):
        base.model.to(dtype).save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
