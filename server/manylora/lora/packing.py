"""From a validated adapter to the flat buffer that slots and the host tier hold."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from manylora.lora.format import Adapter, LoraModule, TensorView
from manylora.lora.layout import Layout

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


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
    return torch.from_numpy(raw).view(_DTYPES[view.dtype]).reshape(view.shape)


def pack(adapter: Adapter, sites: Mapping[str, int], dtype: torch.dtype) -> PackedAdapter:
    """Lay an adapter out for the kernels.

    `sites` maps module paths to their index in the model. A is stored [padded rank, in], B transposed to
    [padded rank, out] with the scaling folded in, once, here. An embedding's A ([r, vocab]) is stored
    [vocab, padded rank] in the same room, so that a token's row is contiguous.
    """
    modules = {sites[m.path]: m for m in adapter.modules}
    ranks = {site: m.rank for site, m in modules.items()}
    shapes = {site: (m.a.shape[1], m.b.shape[0]) for site, m in modules.items()}
    layout = Layout.of(ranks, shapes)
    data = torch.zeros(layout.numel, dtype=dtype)
    for site, module in modules.items():
        _write(data, layout, site, module)
    return PackedAdapter(layout, ranks, data)


def _write(data: torch.Tensor, layout: Layout, site: int, module: LoraModule) -> None:
    extent, rank = layout.extents[site], module.rank
    a, b = _tensor(module.a), _tensor(module.b)
    room_a = data[extent.a : extent.a + extent.padded * extent.in_features]
    room_b = data[extent.b : extent.b + extent.padded * extent.out_features]
    if module.kind == "embedding":
        room_a.view(extent.in_features, extent.padded)[:, :rank] = a.T
    else:
        room_a.view(extent.padded, extent.in_features)[:rank] = a
    room_b.view(extent.padded, extent.out_features)[:rank] = (b.float() * module.scale).T
