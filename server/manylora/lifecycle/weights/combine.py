"""Several adapters' deltas as one: the methods of `manylora merge`, on one module's full ΔW.

linear and cat are the exact weighted sum; svd is that sum at a smaller rank. ties (Yadav et al., 2023) keeps
the largest entries of each delta, elects a sign for each entry, and takes the weighted mean of what agrees;
dare_ties (Yu et al., 2024) drops entries at random and scales up the rest before the election. PEFT calls
them svd, ties_svd and dare_ties_svd.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from manylora.errors import InvalidRequest

Method = Literal["linear", "cat", "svd", "ties", "dare_ties"]
METHODS: tuple[Method, ...] = get_args(Method)


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


def check_density(density: float) -> None:
    """Raises InvalidRequest."""
    if not 0 < density <= 1:
        raise InvalidRequest(f"--density is a share between 0 and 1, not {density:g}.")


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
