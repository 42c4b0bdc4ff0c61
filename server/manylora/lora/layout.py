"""How one adapter lies in memory: every module's A and B one after the other in a flat buffer.

Host and device hold adapters in the same layout, so bringing one to the device is a single copy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

RANK_STEP = 8
_ALIGN = 32  # elements: every matrix starts on a cache line, in bf16 too


def padded_rank(rank: int) -> int:
    """The rank an adapter occupies: 4, or the next multiple of 8. Padding rows are zero and never read."""
    return 4 if rank <= 4 else -(-rank // RANK_STEP) * RANK_STEP


@dataclass(frozen=True, slots=True)
class Extent:
    """Where one module's matrices lie, in elements: A [padded, in_features] at `a`, B [padded, out_features] at `b`."""

    a: int
    b: int
    padded: int
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Layout:
    """The modules an adapter touches and their padded ranks.

    Adapters of equal layout are interchangeable in memory. `sites` are indices into the model's list of
    adaptable modules, ascending.
    """

    sites: tuple[tuple[int, int, int, int], ...]  # (site, padded rank, in_features, out_features)

    @classmethod
    def of(cls, ranks: Mapping[int, int], shapes: Mapping[int, tuple[int, int]]) -> "Layout":
        """From each touched site's rank, and each site's (in_features, out_features)."""
        return cls(tuple((s, padded_rank(r), *shapes[s]) for s, r in sorted(ranks.items())))

    @cached_property
    def extents(self) -> dict[int, Extent]:
        found: dict[int, Extent] = {}
        offset = 0
        for site, padded, in_features, out_features in self.sites:
            a = offset
            b = _aligned(a + padded * in_features)
            offset = _aligned(b + padded * out_features)
            found[site] = Extent(a, b, padded, in_features, out_features)
        return found

    @cached_property
    def numel(self) -> int:
        """Elements of the whole buffer."""
        return max((_aligned(e.b + e.padded * e.out_features) for e in self.extents.values()), default=0)

    def __hash__(self) -> int:
        return hash(self.sites)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN
