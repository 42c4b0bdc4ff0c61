"""Random packed adapters, with the matrices they were made of."""

from collections.abc import Mapping

import torch

from manylora.lora.kernels.reference import LowRank
from manylora.lora.layout import Layout
from manylora.lora.packing import PackedAdapter

Shapes = Mapping[int, tuple[int, int]]


def random_packed(
    ranks: Mapping[int, int],
    shapes: Shapes,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    embeddings: frozenset[int] = frozenset(),
) -> tuple[PackedAdapter, dict[int, LowRank]]:
    """An adapter with `ranks` by site; a site of `embeddings` keeps its A as [vocabulary, padded rank]."""
    generator = torch.Generator().manual_seed(seed)
    layout = Layout.of(ranks, shapes)
    data = torch.zeros(layout.numel, dtype=dtype)
    pairs: dict[int, LowRank] = {}
    for site, rank in ranks.items():
        extent = layout.extents[site]
        a = (torch.randn(rank, extent.in_features, generator=generator) / extent.in_features**0.5).to(dtype)
        b = (torch.randn(rank, extent.out_features, generator=generator) / rank**0.5).to(dtype)
        room_a = data[extent.a : extent.a + extent.padded * extent.in_features]
        room_b = data[extent.b : extent.b + extent.padded * extent.out_features]
        if site in embeddings:
            room_a.view(extent.in_features, extent.padded)[:, :rank] = a.T
        else:
            room_a.view(extent.padded, extent.in_features)[:rank] = a
        room_b.view(extent.padded, extent.out_features)[:rank] = b
        pairs[site] = LowRank(a, b)
    return PackedAdapter(layout, dict(ranks), data), pairs
