"""Random packed adapters, with the matrices they were made of."""

from collections.abc import Mapping

import torch

from manylora.kernels.reference import LowRank
from manylora.lora.memory.layout import Layout
from manylora.lora.memory.packing import FORMATS, PackedAdapter

Shapes = Mapping[int, tuple[int, int]]


def random_packed(
    ranks: Mapping[int, int],
    shapes: Shapes,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    embeddings: frozenset[int] = frozenset(),
) -> tuple[PackedAdapter, dict[int, LowRank]]:
    """An adapter with `ranks` by site; a site of `embeddings` keeps its A as [vocabulary, padded rank].

    The scales of an int8 one are multiplied into the A that is returned.
    """
    generator = torch.Generator().manual_seed(seed)
    layout = Layout.of(ranks, shapes, FORMATS[dtype], has_scales=dtype == torch.int8)
    data = torch.zeros(layout.numel, dtype=dtype)
    pairs: dict[int, LowRank] = {}
    for site, rank in ranks.items():
        extent = layout.low_rank[site]
        a = torch.randn(rank, extent.in_features, generator=generator)
        b = torch.randn(rank, extent.out_features, generator=generator)
        pair = LowRank((a / extent.in_features**0.5).to(dtype), (b / rank**0.5).to(dtype))
        if dtype == torch.int8:
            a, b = (a * 30).to(dtype), (b * 30).to(dtype)
            scales = torch.rand(rank, generator=generator) / (900 * extent.in_features**0.5 * rank**0.5)
            data[extent.scales : extent.scales + 4 * rank].view(torch.float32).copy_(scales)
            pair = LowRank(a * scales[:, None], b)
        else:
            a, b = pair.a, pair.b
        room_a = data[extent.a : extent.a + extent.padded * extent.in_features]
        room_b = data[extent.b : extent.b + extent.padded * extent.out_features]
        if site in embeddings:
            room_a.view(extent.in_features, extent.padded)[:, :rank] = a.T
        else:
            room_a.view(extent.padded, extent.in_features)[:rank] = a
        room_b.view(extent.padded, extent.out_features)[:rank] = b
        pairs[site] = pair
    return PackedAdapter(layout, dict(ranks), data), pairs
