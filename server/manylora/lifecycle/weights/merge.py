"""`merge`: adapters into the base as an ordinary checkpoint, or several adapters into one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from manylora.errors import InvalidRequest
from manylora.lifecycle.adapter_files import write_adapter
from manylora.lifecycle.base import Base, load_base, named_base
from manylora.lifecycle.card import Card, write_card
from manylora.lifecycle.output import result_and_report, safetensors_as_os_errors, write_json
from manylora.lifecycle.progress import Listener, Progress, ignore
from manylora.lifecycle.weights.compress import chosen_dtype
from manylora.lifecycle.weights.config import AUTO, DEFAULT, NONE, MergeConfig, check_merge
from manylora.lifecycle.weights.deltas import (
    REPORT,
    SUMS,
    check_one_base,
    concatenated,
    delta_of,
    kind_of,
    paths_of,
    unmerged,
    verify,
)
from manylora.lifecycle.weights.low_rank import (
    Lora,
    Pair,
    applied,
    as_stored,
    lora_files,
    read_lora,
    short_targets,
    thin_svd,
    truncate,
)
from manylora.lifecycle.weights.probes import logits_of
from manylora.models.stages import quiet

__all__ = ["merge"]


def merge(config: MergeConfig, *, overwrite: bool = False, listen: Listener = ignore) -> dict[str, Any]:
    """Write the checkpoint or adapter and, beside it, the report, which is returned.

    Raises InvalidRequest or InvalidAdapter for bad input, before a model is loaded where that is possible.
    """
    check_merge(config, overwrite=overwrite)
    loras = [read_lora(folder) for folder, _ in config.adapters]
    check_one_base(loras, config)
    report: dict[str, Any] = {
        "adapters": [f"{folder.name}:{weight:g}" for folder, weight in config.adapters],
        "method": config.method,
    }
    if config.into_base:
        _into_base(config, report, listen)
    else:
        _into_adapter(config, loras, report, listen)
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


def _into_adapter(config: MergeConfig, loras: Sequence[Lora], report: dict[str, Any], listen: Listener) -> None:
    paths = paths_of(loras)
    dtype = chosen_dtype(config.dtype, loras[0].dtype)
    pairs: dict[str, Pair] = {}
    modules: dict[str, dict[str, float]] = {}
    for done, path in enumerate(paths, start=1):
        pairs[path], kept, error = _merged_pair(config, loras, path)
        modules[path] = {"rank": pairs[path].rank, "energy": kept, "error": error}
        listen(Progress("merge", done, len(paths)))
    names = {lora.base_name for lora in loras}
    base_name = names.pop() if len(names) == 1 else None
    files = lora_files(pairs, targets=_targets(loras, paths), base_name=base_name, dtype=dtype)
    report |= {"base": base_name, "dtype": str(dtype).removeprefix("torch."), "num_modules": len(paths)}
    report["modules"] = modules
    _verify_adapter(config, loras, {path: as_stored(pair, dtype) for path, pair in pairs.items()}, report, listen)
    with result_and_report(config.out) as (result, beside):
        report["size_bytes"] = write_adapter(result, *files)
        write_card(result, _card(config, report))
        write_json(beside / REPORT, report)


def _verify_adapter(
    config: MergeConfig, loras: Sequence[Lora], merged: Mapping[str, Pair], report: dict[str, Any], listen: Listener
) -> None:
    """Compare base + merged adapter with base + the weighted adapters, where the base is at hand."""
    is_there, model = (True, None if config.verify_on == DEFAULT else config.verify_on)
    if config.verify_on == AUTO:
        is_there, model = named_base(report["base"])
    if config.verify_on == NONE:
        return
    if not is_there:
        named = ", ".join(sorted({lora.base_name or "none" for lora in loras}))
        message = f"Not verified on logits: the adapters' base ({named}) is not here. Give `verify_on` MODEL."
        listen(Progress("warning", message=message))
        return
    base = load_base(model, device="cpu", dtype="float32")
    before = logits_of(base.model, base.tokenizer)
    with applied(base.model, unmerged(config, loras, {path: delta_of(config, loras, path) for path in merged})):
        wanted = logits_of(base.model, base.tokenizer)
    with applied(base.model, merged):
        found = logits_of(base.model, base.tokenizer)
    verify(report, before, wanted, found, listen)


def _card(config: MergeConfig, report: dict[str, Any]) -> Card:
    ranks = [m["rank"] for m in report["modules"].values()]
    facts = [
        ("Base", report["base"] or "not named"),
        ("Made from", ", ".join(report["adapters"])),
        ("Method", config.method),
        ("Ranks", f"{min(ranks)} to {max(ranks)}"),
    ]
    if "difference" in report:
        facts.append(("Largest logit difference", f"{report['difference']['max_abs_logit']:.3g} on the probe prompts"))
    return Card.of_weights(config.out.name, config.command, tuple(facts))


def _merged_pair(config: MergeConfig, loras: Sequence[Lora], path: str) -> tuple[Pair, float, float]:
    if config.method in SUMS:
        joined = concatenated(config, loras, path)
        if config.method == "cat" and config.rank is None:
            return joined, 1.0, 0.0
        left, values, right = thin_svd(joined)
        # the sum's own rank: what is below rounding error of the largest value is not there
        full = int((values > values[0] * 1e-6).sum()) if len(values) else 1
        return truncate(left, values, right, joined.kind, config.rank or max(1, full))
    delta = delta_of(config, loras, path)
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    rank = config.rank or sum(lora.pairs[path].rank for lora in loras if path in lora.pairs)
    return truncate(left, values, right, kind_of(loras, path), rank)


def _targets(loras: Sequence[Lora], paths: Sequence[str]) -> list[str]:
    """Leaf names when all the adapters agree that a leaf is adapted everywhere they know of; else full paths."""
    return (
        short_targets(paths, paths)
        if all(set(lora.pairs) == set(paths) for lora in loras)
        and not any(lora.config.get("layers_to_transform") for lora in loras)
        else sorted(paths)
    )
