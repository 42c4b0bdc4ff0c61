"""`manylora extract`: an adapter out of a full fine-tune, by the truncated SVD of each linear's change."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from manylora.errors import InvalidRequest
from manylora.lifecycle.adapter_files import write_adapter
from manylora.lifecycle.base import Base, load_base
from manylora.lifecycle.card import Card, write_card
from manylora.lifecycle.output import refuse_existing, result_and_report, write_json
from manylora.lifecycle.progress import Listener, Progress, ignore
from manylora.lifecycle.weights.compress import chosen_dtype
from manylora.lifecycle.weights.config import ExtractConfig, check_rank_or_energy
from manylora.lifecycle.weights.low_rank import (
    Pair,
    applied,
    as_stored,
    lora_files,
    rank_for_energy,
    short_targets,
    truncate,
)
from manylora.lifecycle.weights.probes import difference, logits_of
from manylora.lora.format.spec import ModuleSpec


def extract(config: ExtractConfig, *, overwrite: bool = False, listen: Listener = ignore) -> dict[str, Any]:
    """Write the adapter and, beside it, the report, which is returned.

    The report's `not_expressed` lists every changed parameter that a low-rank delta on linears cannot hold
    (embeddings, norms, biases), with the size of its change. Raises InvalidRequest when the two models differ
    in shape or not at all.
    """
    check_rank_or_energy(config.rank, config.energy)
    refuse_existing(config.out, overwrite=overwrite)
    dtype = chosen_dtype(config.dtype, torch.float32)
    base = load_base(config.base, name=config.base_name, device="cpu", dtype="float32")
    tuned = load_base(config.tuned, device="cpu", dtype="float32")
    before, after = dict(base.model.named_parameters()), dict(tuned.model.named_parameters())
    _check_alike(before, after)
    linears = _linears(base, before)
    pairs, modules = _factorise(config, linears, before, after, dtype, listen)
    if not pairs:
        raise InvalidRequest(f"No linear of {config.tuned} differs from the base: there is nothing to extract.")
    files = lora_files(pairs, targets=short_targets(list(pairs), list(linears)), base_name=base.name, dtype=dtype)
    listen(Progress("compare", message="Comparing the logits of base + adapter with the fine-tune's"))
    wanted = logits_of(tuned.model, base.tokenizer)
    unadapted = difference(wanted, logits_of(base.model, base.tokenizer))
    with applied(base.model, {path: as_stored(pair, dtype) for path, pair in pairs.items()}):
        adapted = difference(wanted, logits_of(base.model, base.tokenizer))
    report: dict[str, Any] = {
        "base": base.name,
        "tuned": Path(config.tuned).name,
        "dtype": config.dtype,
        "modules": modules,
        "not_expressed": _not_expressed(before, after, {f"{path}.weight" for path in linears}),
        "difference": {"base": asdict(unadapted), "adapter": asdict(adapted)},
    }
    with result_and_report(config.out) as (result, beside):
        report["size_bytes"] = write_adapter(result, *files)
        write_card(result, _card(config, report))
        write_json(beside / "extract.json", report)
    return report


def _card(config: ExtractConfig, report: dict[str, Any]) -> Card:
    modules, found = report["modules"].values(), report["difference"]["adapter"]
    missing = ", ".join(entry["parameter"] for entry in report["not_expressed"][:3])
    more = len(report["not_expressed"]) - 3
    facts = [
        ("Base", report["base"]),
        ("Made from", f"{report['tuned']}, a full fine-tune"),
        ("Ranks", f"{min(m['rank'] for m in modules)} to {max(m['rank'] for m in modules)}"),
        ("Least energy kept in a module", f"{min(m['energy'] for m in modules):.2%}"),
        ("Largest logit difference from the fine-tune", f"{found['max_abs_logit']:.3g} on the probe prompts"),
        ("Changes it does not hold", (missing + (f" and {more} more" if more > 0 else "")) or "none"),
    ]
    return Card.of_weights(config.out.name, config.command, tuple(facts))


def _check_alike(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> None:
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise InvalidRequest(f"The two models have different parameters: {', '.join(odd[:5])}. Is this the right base?")
    for name, weight in before.items():
        if weight.shape != after[name].shape:
            raise InvalidRequest(
                f"{name} is {list(weight.shape)} in the base and {list(after[name].shape)} in the fine-tune. "
                "Extended vocabularies and other shapes cannot be extracted."
            )


def _linears(base: Base, parameters: Mapping[str, torch.Tensor]) -> dict[str, ModuleSpec]:
    """Linears with a weight of their own; a head tied to the embedding counts as embedding."""
    from manylora.models.wrapping import adaptable_modules

    found = adaptable_modules(base.model)
    return {p: spec for p, spec in found.items() if spec.kind != "embedding" and f"{p}.weight" in parameters}


def _factorise(
    config: ExtractConfig,
    linears: Mapping[str, ModuleSpec],
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    listen: Listener,
) -> tuple[dict[str, Pair], dict[str, dict[str, float]]]:
    pairs: dict[str, Pair] = {}
    modules: dict[str, dict[str, float]] = {}
    for done, (path, spec) in enumerate(linears.items(), start=1):
        listen(Progress("extract", done, len(linears)))
        delta = (after[f"{path}.weight"] - before[f"{path}.weight"]).detach()
        if not bool(delta.any()):
            continue
        if not bool(delta.isfinite().all()):
            raise InvalidRequest(f"{path} is not finite (NaN or infinity) in the base or in the fine-tune.")
        if spec.kind == "conv1d":
            delta = delta.T
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        rank = config.rank if config.energy is None else rank_for_energy(values, config.energy)
        assert rank is not None
        pairs[path], kept, discarded = truncate(left, values, right, spec.kind, rank)
        modules[path] = {
            "rank": pairs[path].rank,
            "energy": kept,
            "norm": float(delta.norm()),
            "discarded": discarded,
            "error": float((delta - as_stored(pairs[path], dtype).dense()).norm()),
        }
    return pairs, modules


def _not_expressed(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], expressed: set[str]
) -> list[dict[str, Any]]:
    found = []
    for name, weight in before.items():
        change = (after[name] - weight).detach()
        if name not in expressed and bool(change.any()):
            found.append({"parameter": name, "norm": float(change.norm()), "largest": float(change.abs().max())})
    return found
