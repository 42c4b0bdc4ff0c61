"""From a validated adapter to the flat buffer that slots and the host tier hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from manylora.lora.format.reader import Adapter, LoraModule, TensorView
from manylora.lora.memory.layout import Layout, NumberFormat
from manylora.lora.memory.pages import zeros

FILE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
TORCH_DTYPES: Final[Mapping[NumberFormat, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
FORMATS: Final = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """`data`: one dimension, `layout.numel` elements; `ranks`: true rank of each touched site."""

    layout: Layout
    ranks: dict[int, int]
    data: torch.Tensor

    @property
    def size_bytes(self) -> int:
        return self.data.numel() * self.data.element_size()


def _tensor(view: TensorView) -> torch.Tensor:
    # Read-only memory: torch only ever reads it here, so the writable flag is borrowed through numpy.
    raw = np.frombuffer(view.data, dtype=np.uint8).copy()
    return torch.from_numpy(raw).view(FILE_DTYPES[view.dtype]).reshape(view.shape)


def pack(adapter: Adapter, sites: Mapping[str, int], dtype: torch.dtype, *, has_scales: bool = False) -> PackedAdapter:
    """Lay an adapter out for the kernels, in `dtype`.

    `sites` maps module paths to their index in the model. A is stored [padded rank, in], B transposed to
    [padded rank, out]. An embedding's A ([r, vocab]) is stored [vocab, padded rank] in the same room, so that a
    token's row is contiguous. The scaling is folded into B, once, here; with `has_scales` it is kept beside the
    matrices instead, which then hold exactly what the files do, if `dtype` can.

    In int8, which always has scales, every row of A and of B as stored (so one of each per rank) is rounded to 127
    steps of its own either way; a rank's scale is its steps' product times the scaling.
    """
    has_scales = has_scales or dtype == torch.int8
    modules = {sites[m.path]: m for m in adapter.modules}
    ranks = {site: m.rank for site, m in modules.items()}
    shapes = {site: (m.a.shape[1], m.b.shape[0]) for site, m in modules.items()}
    layout = Layout.of(ranks, shapes, FORMATS[dtype], has_scales=has_scales)
    data = zeros(layout.numel, dtype)
    for site, module in modules.items():
        _write(data, layout, site, module)
    return PackedAdapter(layout, ranks, data)


def _write(data: torch.Tensor, layout: Layout, site: int, module: LoraModule) -> None:
    extent, rank = layout.extents[site], module.rank
    a, b = _tensor(module.a), _tensor(module.b).T
    if layout.has_scales:
        scales = torch.full((rank,), module.scale)
        if layout.dtype == "int8":
            (a, steps_a), (b, steps_b) = _rounded(a.float()), _rounded(b.float())
            scales *= steps_a * steps_b
        room = data[extent.scales : extent.scales + rank * layout.scale_elements]
        room.view(torch.float32).copy_(scales)
    else:
        b = b.float() * module.scale
    room_a = data[extent.a : extent.a + extent.padded * extent.in_features]
    room_b = data[extent.b : extent.b + extent.padded * extent.out_features]
    if module.kind == "embedding":
        room_a.view(extent.in_features, extent.padded)[:, :rank] = a.T
    else:
        room_a.view(extent.padded, extent.in_features)[:rank] = a
    room_b.view(extent.padded, extent.out_features)[:rank] = b


def _rounded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row in whole steps of its own, -127 to 127, and the steps [rows]."""
    steps = rows.abs().amax(dim=1) / 127
    steps = torch.where(steps > 0, steps, torch.ones_like(steps))
    return (rows / steps[:, None]).round().to(torch.int8), steps
