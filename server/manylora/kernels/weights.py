"""A linear's weight in the order in which the C++ kernel reads it."""

from dataclasses import dataclass

import torch

PANEL_WIDTH = 64  # outputs that lie side by side


@dataclass(frozen=True, slots=True)
class PanelWeight:
    """A weight [out_features, in_features], packed for `native.linear`.

    `packed` [ceil(out / 64), ceil(in / depth), 64, depth], zero beyond the ends. `depth` is 2 for bfloat16, since some
    CPUs multiply and add pairs of them, and 1 otherwise.
    """

    packed: torch.Tensor
    out_features: int

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes


def pack_panels(weight: torch.Tensor) -> PanelWeight:
    """Copy `weight` [out, in], float32, bfloat16 or float16, into panels."""
    out_features, in_features = weight.shape
    depth = 2 if weight.dtype is torch.bfloat16 else 1
    rows, columns = -(-out_features // PANEL_WIDTH), -(-in_features // depth)
    padded = weight.new_zeros(rows * PANEL_WIDTH, columns * depth)
    padded[:out_features, :in_features] = weight
    packed = padded.view(rows, PANEL_WIDTH, columns, depth).permute(0, 2, 1, 3).contiguous()
    return PanelWeight(packed, out_features)
