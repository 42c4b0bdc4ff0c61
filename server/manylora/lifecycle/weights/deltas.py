"""What is merged, as it is told and as it is computed: shared by both kinds of `manylora merge`."""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from manylora.errors import InvalidRequest, ManyloraError
from manylora.lifecycle.output import refuse_existing
from manylora.lifecycle.progress import Listener, Progress
from manylora.lifecycle.weights.combine import METHODS, Method, check_density, combined
from manylora.lifecycle.weights.compress import chosen_dtype
from manylora.lifecycle.weights.low_rank import Lora, Pair
from manylora.lifecycle.weights.probes import difference
from manylora.lora.format.spec import ModuleKind

REPORT = "merge.json"
AUTO, DEFAULT, NONE = "auto", "default", "none"
SUMS = ("linear", "cat", "svd")
_SWALLOWED = 0.25  # a rounding error above this share of the adapters' own effect is worth a warning


@dataclass(frozen=True, slots=True)
class MergeConfig:
    """`adapters` are folders with their weights. `into_base` False makes one adapter of several.

    `rank` is the merged adapter's (None: the sum of the ranks, which loses nothing); `density` is for ties and
    dare_ties. A merged adapter is verified on the base that its parts name where that is on this machine, or on
    `verify_on` (a model, `default`, or `none`).
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
    verify_on: str = AUTO
    command: str = ""


def parse_adapter(text: str) -> tuple[Path, float]:
    """`folder` or `folder:weight`. Raises InvalidRequest for a weight that is no number."""
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        weight = float(tail)
    except ValueError as error:
        raise InvalidRequest(f"--adapter {text}: {tail!r} is not a weight; write FOLDER:0.5.") from error
    if not math.isfinite(weight):
        raise InvalidRequest(f"--adapter {text}: a weight must be a finite number.")
    return Path(head), weight


def check(config: MergeConfig, *, overwrite: bool) -> None:
    """Raises InvalidRequest for arguments that do not go together or are out of range."""
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


def check_one_base(loras: Sequence[Lora], config: MergeConfig) -> None:
    """Raises InvalidRequest when the adapters' shapes say that they are not of one base."""
    for path, pair in loras[0].pairs.items():
        for lora, (folder, _) in zip(loras, config.adapters, strict=True):
            other = lora.pairs.get(path)
            if other is not None and other.shape != pair.shape:
                raise InvalidRequest(f"{folder} was made for another base: {path} is {other.shape}, not {pair.shape}.")


def delta_of(config: MergeConfig, loras: Sequence[Lora], path: str) -> torch.Tensor:
    """The merged ΔW [out, in] of one module, in full."""
    having = [
        (lora.pairs[path].dense(), w) for lora, (_, w) in zip(loras, config.adapters, strict=True) if path in lora.pairs
    ]
    # one seed for every module would drop the same entries in all of them
    seed = zlib.crc32(f"{config.seed} {path}".encode())
    return combined([d for d, _ in having], [w for _, w in having], config.method, density=config.density, seed=seed)


def paths_of(loras: Sequence[Lora]) -> list[str]:
    return list(dict.fromkeys(path for lora in loras for path in lora.pairs))


def unmerged(config: MergeConfig, loras: Sequence[Lora], deltas: Mapping[str, torch.Tensor]) -> dict[str, Pair]:
    """What base + adapters compute while the base is untouched: the low-rank way where there is one."""
    if config.method in SUMS:
        return {path: concatenated(config, loras, path) for path in deltas}
    return {path: Pair(kind_of(loras, path), delta, torch.eye(delta.shape[0])) for path, delta in deltas.items()}


def kind_of(loras: Sequence[Lora], path: str) -> ModuleKind:
    return next(lora.pairs[path].kind for lora in loras if path in lora.pairs)


def concatenated(config: MergeConfig, loras: Sequence[Lora], path: str) -> Pair:
    """The weighted sum of one module's deltas as one pair, whose rank is the sum of theirs."""
    having = [(lora.pairs[path], w) for lora, (_, w) in zip(loras, config.adapters, strict=True) if path in lora.pairs]
    return Pair(having[0][0].kind, torch.cat([p.a for p, _ in having]), torch.cat([p.b * w for p, w in having], dim=1))


def verify(
    report: dict[str, Any],
    before: list[torch.Tensor],
    wanted: list[torch.Tensor],
    found: list[torch.Tensor],
    listen: Listener,
) -> None:
    """Put `effect` (of the adapters) and `difference` (of the result from base + adapters) into the report.

    Raises ManyloraError when the result's logits are no numbers.
    """
    if not all(bool(logits.isfinite().all()) for logits in found):
        raise ManyloraError(
            f"The result answers with NaN or infinity: {report['dtype']} cannot hold it. Choose --dtype bfloat16 or "
            "float32. Nothing was written."
        )
    effect, off = difference(before, wanted), difference(wanted, found)
    report |= {"effect": asdict(effect), "difference": asdict(off)}
    if off.max_abs_logit > _SWALLOWED * effect.max_abs_logit:
        rank = "a larger --rank or " if "modules" in report else ""
        message = (
            f"The result is off by up to {off.max_abs_logit:.3g} in the logits, and the adapters themselves move them "
            f"by {effect.max_abs_logit:.3g}: much of their effect is lost. Choose {rank}--dtype float32."
        )
        report["warnings"] = [message]
        listen(Progress("warning", message=message))
