"""`manylora compress`: fewer ranks for the same adapter, the best possible for each module, without the full matrix."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manylora.errors import InvalidRequest
from manylora.lifecycle.adapter_files import write_adapter
from manylora.lifecycle.low_rank import Pair, lora_files, rank_for_energy, read_lora, thin_svd, truncate
from manylora.lifecycle.output import atomic_folder, refuse_existing, write_json
from manylora.lifecycle.progress import Listener, Progress, ignore

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class CompressConfig:
    """Exactly one of `rank` and `energy` (the share of ‖ΔW‖² to keep in each module). dtype None: the source's."""

    adapter: Path
    out: Path
    rank: int | None = None
    energy: float | None = None
    dtype: str | None = None


def check_rank_or_energy(rank: int | None, energy: float | None) -> None:
    """Raises InvalidRequest unless one of the two is given, and in range."""
    if (rank is None) == (energy is None):
        raise InvalidRequest("Give either --rank or --energy.")
    if rank is not None and rank < 1:
        raise InvalidRequest(f"--rank must be at least 1, not {rank}.")
    if energy is not None and not 0 < energy <= 1:
        raise InvalidRequest(f"--energy is a share between 0 and 1, not {energy:g}.")


def chosen_dtype(name: str | None, default: torch.dtype) -> torch.dtype:
    """Raises InvalidRequest for a dtype that an adapter cannot have."""
    if name is None:
        return default
    if name not in DTYPES:
        raise InvalidRequest(f"--dtype must be one of {', '.join(DTYPES)}, not {name!r}.")
    return DTYPES[name]


def compress(config: CompressConfig, *, overwrite: bool = False, listen: Listener = ignore) -> dict[str, Any]:
    """Write the compressed adapter and, beside it, the report, which is returned.

    Raises InvalidRequest or InvalidAdapter for bad input, ManyloraError when it cannot be written.
    """
    check_rank_or_energy(config.rank, config.energy)
    refuse_existing(config.out, overwrite=overwrite)
    source = read_lora(config.adapter)
    dtype = chosen_dtype(config.dtype, source.dtype)
    pairs: dict[str, Pair] = {}
    modules: dict[str, dict[str, float]] = {}
    for done, (path, pair) in enumerate(source.pairs.items(), start=1):
        left, values, right = thin_svd(pair)
        rank = config.rank if config.energy is None else rank_for_energy(values, config.energy)
        assert rank is not None
        pairs[path], kept, error = truncate(left, values, right, pair.kind, rank)
        modules[path] = {"rank_before": pair.rank, "rank": pairs[path].rank, "energy": kept, "error": error}
        listen(Progress("compress", done, len(source.pairs)))
    files = lora_files(pairs, targets=source.config["target_modules"], base_name=source.base_name, dtype=dtype)
    for key in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        if source.config.get(key):
            files[0][key] = source.config[key]
    with atomic_folder(config.out) as draft:
        size = write_adapter(draft, *files)
    report = {
        "adapter": config.adapter.name,
        "size_bytes_before": source.size_bytes,
        "size_bytes": size,
        "num_parameters_before": source.num_parameters,
        "num_parameters": sum(p.a.numel() + p.b.numel() for p in pairs.values()),
        "modules": modules,
    }
    write_json(config.out.parent / f"{config.out.name}.report" / "compress.json", report)
    return report
