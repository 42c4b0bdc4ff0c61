"""Several adapters' deltas as one: what `merge` computes, for a base and for an adapter.

linear and cat are the exact weighted sum; svd is that sum at a smaller rank. ties (Yadav et al., 2023) keeps
the largest entries of each delta, elects a sign for each entry, and takes the weighted mean of what agrees;
dare_ties (Yu et al., 2024) drops entries at random and scales up the rest before the election. PEFT calls
them svd, ties_svd and dare_ties_svd.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from manylora.errors import InvalidRequest, ManyloraError
from manylora.lifecycle.progress import Listener, Progress
from manylora.lifecycle.weights.config import MergeConfig, Method
from manylora.lifecycle.weights.low_rank import Lora, Pair
from manylora.lifecycle.weights.probes import difference
from manylora.lora.format.spec import ModuleKind

REPORT = "merge.json"
SUMS = ("linear", "cat", "svd")
_SWALLOWED = 0.25  # a rounding error above this share of the adapters' own effect is worth a warning


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
            f"The result answers with NaN or infinity: {report['dtype']} cannot hold it. Choose `dtype` bfloat16 or "
            "float32. Nothing was written."
        )
    effect, off = difference(before, wanted), difference(wanted, found)
    report |= {"effect": asdict(effect), "difference": asdict(off)}
    if off.max_abs_logit > _SWALLOWED * effect.max_abs_logit:
        rank = "a larger `rank` or " if "modules" in report else ""
        message = (
            f"The result is off by up to {off.max_abs_logit:.3g} in the logits, and the adapters themselves move them "
            f"by {effect.max_abs_logit:.3g}: much of their effect is lost. Choose {rank}`dtype` float32."
        )
        report["warnings"] = [message]
        listen(Progress("warning", message=message))


def combined(
    deltas: Sequence[torch.Tensor], weights: Sequence[float], method: Method, *, density: float, seed: int
) -> torch.Tensor:
    """One ΔW [out, in] out of several of the same shape. `seed` decides what dare_ties drops."""
    stacked, factors = torch.stack(list(deltas)), torch.tensor(weights)[:, None, None]
    if method in ("linear", "cat", "svd"):
        return (stacked * factors).sum(0)
    if method == "ties":
        thinned = torch.stack([_largest(delta, density) for delta in deltas])
    else:
        random = torch.Generator().manual_seed(seed)
        thinned = torch.where(torch.rand(stacked.shape, generator=random) < density, stacked / density, 0.0)
    return _elected_mean(thinned, factors)


def _largest(delta: torch.Tensor, density: float) -> torch.Tensor:
    """The `density` share of the entries that is largest in size; the rest zero."""
    keep = int(density * delta.numel())
    kept = torch.zeros_like(delta).flatten()
    places = delta.flatten().abs().topk(keep).indices
    kept[places] = delta.flatten()[places]
    return kept.view_as(delta)


def _elected_mean(deltas: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """[n, out, in] to [out, in]: the weighted mean over those whose sign is the sum's sign.

    The mean is over those who agree and not over all, so a change that only one adapter makes keeps its size.
    """
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agrees = deltas.sign() == sign
    return (deltas * factors * agrees).sum(0) / agrees.sum(0).clamp(min=1)
