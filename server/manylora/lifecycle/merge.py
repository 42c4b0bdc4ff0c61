"""`manylora merge`: adapters into the base as an ordinary checkpoint, or several adapters into one."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from manylora.errors import InvalidRequest
from manylora.lifecycle.adapter_files import write_adapter
from manylora.lifecycle.base import Base, load_base
from manylora.lifecycle.combine import METHODS, Method, check_density, combined
from manylora.lifecycle.compress import chosen_dtype
from manylora.lifecycle.low_rank import (
    Lora,
    Pair,
    applied,
    lora_files,
    read_lora,
    short_targets,
    thin_svd,
    truncate,
)
from manylora.lifecycle.output import atomic_folder, refuse_existing, write_json
from manylora.lifecycle.probes import difference, logits_of
from manylora.lifecycle.progress import Listener, Progress, ignore


@dataclass(frozen=True, slots=True)
class MergeConfig:
    """`adapters` are folders with their weights. `into_base` False makes one adapter of several.

    `rank` is the merged adapter's (None: the sum of the ranks, which loses nothing); `density` is for ties and
    dare_ties.
    """

    adapters: tuple[tuple[Path, float], ...]
    out: Path
    into_base: bool = True
    base: str | None = None
    method: Method = "linear"
    rank: int | None = None
    density: float = 0.5
    dtype: str | None = None
    seed: int = 0


def merge(config: MergeConfig, *, overwrite: bool = False, listen: Listener = ignore) -> dict[str, Any]:
    """Write the checkpoint or adapter and, beside it, the report, which is returned.

    Raises InvalidRequest or InvalidAdapter for bad input, before a model is loaded where that is possible.
    """
    _check(config, overwrite=overwrite)
    loras = [read_lora(folder) for folder, _ in config.adapters]
    _check_one_base(loras, config)
    report = _into_base(config, listen) if config.into_base else _into_adapter(config, loras, listen)
    report = {"adapters": [f"{folder.name}:{weight:g}" for folder, weight in config.adapters]} | report
    write_json(config.out.parent / f"{config.out.name}.report" / "merge.json", report)
    return report


def parse_adapter(text: str) -> tuple[Path, float]:
    """`folder` or `folder:weight`. Raises InvalidRequest for a weight that is no number."""
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(head), float(tail)
    except ValueError as error:
        raise InvalidRequest(f"--adapter {text}: {tail!r} is not a weight; write FOLDER:0.5.") from error


def _check(config: MergeConfig, *, overwrite: bool) -> None:
    if config.method not in METHODS:
        raise InvalidRequest(f"--method must be one of {', '.join(METHODS)}, not {config.method!r}.")
    if not config.adapters:
        raise InvalidRequest("Nothing to merge: give --adapter.")
    if not config.into_base and len(config.adapters) < 2:
        raise InvalidRequest("Merging adapters into one needs at least two --adapter; for the base give --base.")
    if config.rank is not None and (config.rank < 1 or config.into_base):
        raise InvalidRequest("--rank is the merged adapter's rank: at least 1, and not together with --base.")
    if config.method == "svd" and config.rank is None and not config.into_base:
        raise InvalidRequest("--method svd needs the --rank to keep.")
    check_density(config.density)
    chosen_dtype(config.dtype, torch.float32)
    refuse_existing(config.out, overwrite=overwrite)


def _check_one_base(loras: Sequence[Lora], config: MergeConfig) -> None:
    for path, pair in loras[0].pairs.items():
        for lora, (folder, _) in zip(loras, config.adapters, strict=True):
            other = lora.pairs.get(path)
            if other is not None and other.shape != pair.shape:
                raise InvalidRequest(f"{folder} was made for another base: {path} is {other.shape}, not {pair.shape}.")


def _deltas(config: MergeConfig, loras: Sequence[Lora], path: str) -> torch.Tensor:
    having = [
        (lora.pairs[path].dense(), w) for lora, (_, w) in zip(loras, config.adapters, strict=True) if path in lora.pairs
    ]
    return combined(
        [delta for delta, _ in having], [w for _, w in having], config.method, density=config.density, seed=config.seed
    )


def _paths(loras: Sequence[Lora]) -> list[str]:
    return list(dict.fromkeys(path for lora in loras for path in lora.pairs))


def _into_base(config: MergeConfig, listen: Listener) -> dict[str, Any]:
    from manylora.models.wrapping import adaptable_modules

    base = load_base(config.base, device="cpu", dtype="float32")
    modules = adaptable_modules(base.model)
    loras = [read_lora(folder, modules) for folder, _ in config.adapters]
    paths = _paths(loras)
    _check_tied(base, paths)
    before = logits_of(base.model, base.tokenizer)
    deltas = {}
    for done, path in enumerate(paths, start=1):
        deltas[path] = _deltas(config, loras, path)
        listen(Progress("merge", done, len(paths)))
    wanted = _unmerged_logits(config, base, loras, deltas)
    _add(base, deltas, {path: modules[path].kind for path in paths})
    dtype = chosen_dtype(config.dtype, base.stored_dtype)
    with atomic_folder(config.out) as draft:
        _save(base, draft, dtype)
        listen(Progress("verify", message="Reading the checkpoint back to compare it with base + adapter"))
        found = logits_of(load_base(str(draft), device="cpu", dtype="float32").model, base.tokenizer)
    return {
        "method": config.method,
        "dtype": str(dtype).removeprefix("torch."),
        "num_modules": len(paths),
        "effect": asdict(difference(before, wanted)),
        "difference": asdict(difference(wanted, found)),
    }


def _unmerged_logits(
    config: MergeConfig, base: Base, loras: Sequence[Lora], deltas: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    """What base + adapter answers while the base is still untouched: the low-rank way where there is one."""
    if config.method in ("linear", "cat"):
        pairs = {path: _concatenated(config, loras, path) for path in deltas}
    else:
        kinds = {path: next(lora.pairs[path].kind for lora in loras if path in lora.pairs) for path in deltas}
        pairs = {path: Pair(kinds[path], delta, torch.eye(delta.shape[0])) for path, delta in deltas.items()}
    with applied(base.model, pairs):
        return logits_of(base.model, base.tokenizer)


def _concatenated(config: MergeConfig, loras: Sequence[Lora], path: str) -> Pair:
    having = [(lora.pairs[path], w) for lora, (_, w) in zip(loras, config.adapters, strict=True) if path in lora.pairs]
    return Pair(having[0][0].kind, torch.cat([p.a for p, _ in having]), torch.cat([p.b * w for p, w in having], dim=1))


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
    try:
        base.model.to(dtype).save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(None, f"the checkpoint: {error}") from error


def _into_adapter(config: MergeConfig, loras: Sequence[Lora], listen: Listener) -> dict[str, Any]:
    paths = _paths(loras)
    pairs: dict[str, Pair] = {}
    errors: dict[str, dict[str, float]] = {}
    for done, path in enumerate(paths, start=1):
        pairs[path], kept, error = _merged_pair(config, loras, path)
        errors[path] = {"rank": pairs[path].rank, "energy": kept, "error": error}
        listen(Progress("merge", done, len(paths)))
    names = {lora.base_name for lora in loras}
    base_name = names.pop() if len(names) == 1 else None
    dtype = chosen_dtype(config.dtype, loras[0].dtype)
    with atomic_folder(config.out) as draft:
        files = lora_files(pairs, targets=_targets(loras, paths), base_name=base_name, dtype=dtype)
        size = write_adapter(draft, *files)
    return {
        "method": config.method,
        "dtype": str(dtype).removeprefix("torch."),
        "num_modules": len(paths),
        "size_bytes": size,
        "modules": errors,
    }


def _merged_pair(config: MergeConfig, loras: Sequence[Lora], path: str) -> tuple[Pair, float, float]:
    if config.method in ("linear", "cat", "svd"):
        joined = _concatenated(config, loras, path)
        if config.method == "cat" and config.rank is None:
            return joined, 1.0, 0.0
        left, values, right = thin_svd(joined)
        # the sum's own rank: what is below rounding error of the largest value is not there
        full = int((values > values[0] * 1e-6).sum()) if len(values) else 1
        return truncate(left, values, right, joined.kind, config.rank or max(1, full))
    delta = _deltas(config, loras, path)
    kind = next(lora.pairs[path].kind for lora in loras if path in lora.pairs)
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    rank = config.rank or sum(lora.pairs[path].rank for lora in loras if path in lora.pairs)
    return truncate(left, values, right, kind, rank)


def _targets(loras: Sequence[Lora], paths: Sequence[str]) -> list[str]:
    """Leaf names when all the adapters agree that a leaf is adapted everywhere they know of; else full paths."""
    return (
        short_targets(paths, paths)
        if all(set(lora.pairs) == set(paths) for lora in loras)
        and not any(lora.config.get("layers_to_transform") for lora in loras)
        else sorted(paths)
    )
