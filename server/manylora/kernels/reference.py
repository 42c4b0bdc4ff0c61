"""The specification of the low-rank kernels, as an obvious loop in float32.

Every other kernel (torch, C++, Triton) is tested against this one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LowRank:
    """One adapter's weights for one module: `a` [r, in_features], `b` [r, out_features], scaling folded into `b`."""

    a: torch.Tensor
    b: torch.Tensor


def add_lora(
    out: torch.Tensor,
    x: torch.Tensor,
    weights: Sequence[LowRank | None],
    slots: Sequence[int],
) -> torch.Tensor:
    """The base's output plus each row's own low-rank delta.

        result[t] = out[t] + (x[t] @ a[s].T) @ b[s]      s = slots[t], nothing added where s = -1
                                                         or weights[s] is None

    `out` [T, out_features] and `x` [T, in_features] of any float dtype; the sum is made in float32 and
    rounded once to `out`'s dtype. Returns a new tensor. A row depends on its own adapter only, whatever the
    other rows' weights hold.
    """
    result = out.clone()
    for t, slot in enumerate(slots):
        pair = weights[slot] if slot >= 0 else None
        if pair is not None:
            hidden = pair.a.float() @ x[t].float()
            result[t] = (out[t].float() + hidden @ pair.b.float()).to(out.dtype)
    return result
