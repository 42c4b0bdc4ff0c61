"""`manylora compress`: fewer ranks for the same adapter, the best possible for each module, without the full matrix."""

from typing import Any

import torch

from manylora.lifecycle.adapter_files import write_adapter
from manylora.lifecycle.card import Card, write_card
from manylora.lifecycle.output import refuse_existing, result_and_report, write_json
from manylora.lifecycle.progress import Listener, Progress, ignore
from manylora.lifecycle.weights.config import CompressConfig, check_dtype, check_rank_or_energy
from manylora.lifecycle.weights.low_rank import (
    Lora,
    Pair,
    as_stored,
    distance,
    lora_files,
    rank_for_energy,
    read_lora,
    thin_svd,
    truncate,
)


def chosen_dtype(name: str | None, default: torch.dtype) -> torch.dtype:
    """Raises InvalidParameter for a dtype that an adapter cannot have."""
    check_dtype(name)
    chosen: torch.dtype = default if name is None else getattr(torch, name)
    return chosen


def compress(config: CompressConfig, *, overwrite: bool = False, listen: Listener = ignore) -> dict[str, Any]:
    """Write the compressed adapter and, beside it, the report, which is returned.

    Raises InvalidRequest or InvalidAdapter for bad input, ManyloraError when it cannot be written.
    """
    check_rank_or_energy(config.rank, config.energy)
    dtype = chosen_dtype(config.dtype, torch.float32)
    refuse_existing(config.out, overwrite=overwrite)
    source = read_lora(config.adapter)
    if config.dtype is None:
        dtype = source.dtype
    if config.rank is not None and all(pair.rank <= config.rank for pair in source.pairs.values()):
        listen(Progress("warning", message=f"No module has a rank above {config.rank}: nothing gets smaller."))
    pairs, modules = _factorise(config, source, dtype, listen)
    files = lora_files(pairs, targets=source.config["target_modules"], base_name=source.base_name, dtype=dtype)
    for key in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        if source.config.get(key):
            files[0][key] = source.config[key]
    report: dict[str, Any] = {
        "adapter": config.adapter.name,
        "dtype": str(dtype).removeprefix("torch."),
        "size_bytes_before": source.size_bytes,
        "num_parameters_before": source.num_parameters,
        "num_parameters": sum(p.a.numel() + p.b.numel() for p in pairs.values()),
        "modules": modules,
    }
    with result_and_report(config.out) as (result, beside):
        report["size_bytes"] = write_adapter(result, *files)
        write_card(result, _card(config, report, source.base_name))
        write_json(beside / "compress.json", report)
    return report


def _factorise(
    config: CompressConfig, source: Lora, dtype: torch.dtype, listen: Listener
) -> tuple[dict[str, Pair], dict[str, dict[str, float]]]:
    """Each module's best pair, and by module: `discarded`, the singular values left out, as one norm; `error`,
    the distance of what is written from the source's ΔW, which the file's dtype adds to."""
    pairs: dict[str, Pair] = {}
    modules: dict[str, dict[str, float]] = {}
    for done, (path, pair) in enumerate(source.pairs.items(), start=1):
        left, values, right = thin_svd(pair)
        rank = config.rank if config.energy is None else rank_for_energy(values, config.energy)
        assert rank is not None
        pairs[path], kept, discarded = truncate(left, values, right, pair.kind, rank)
        modules[path] = {
            "rank_before": pair.rank,
            "rank": pairs[path].rank,
            "energy": kept,
            "norm": float(values.double().norm()),
            "discarded": discarded,
            "error": distance(pair, as_stored(pairs[path], dtype)),
        }
        listen(Progress("compress", done, len(source.pairs)))
    return pairs, modules


def _card(config: CompressConfig, report: dict[str, Any], base_name: str | None) -> Card:
    ranks = [m["rank"] for m in report["modules"].values()]
    facts = [
        ("Base", base_name or "not named"),
        ("Made from", f"{report['adapter']}, {report['num_parameters_before']:,} parameters"),
        ("Ranks", f"{min(ranks)} to {max(ranks)}"),
        ("Parameters", f"{report['num_parameters']:,} ({report['size_bytes'] / 1e6:.2f} MB)"),
        ("Least energy kept in a module", f"{min(m['energy'] for m in report['modules'].values()):.2%}"),
    ]
    return Card.of_weights(config.out.name, config.command, tuple(facts))
