"""How one adapter lies in memory: every module's A and B one after the other in a flat buffer.

Host and device hold adapters in the same layout, so bringing one to the device is a single copy.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

NumberFormat = Literal["float32", "bfloat16", "float16", "int8"]
ITEM_BYTES: Final[Mapping[NumberFormat, int]] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
RANK_STEP = 8
_ALIGN = 64  # elements: every matrix starts on a cache line, in int8 too


def padded_rank(rank: int) -> int:
    """The rank an adapter occupies: 4, or the next multiple of 8. Padding rows are zero and never read."""
    return 4 if rank <= 4 else -(-rank // RANK_STEP) * RANK_STEP


@dataclass(frozen=True, slots=True)
class Extent:
    """Where one module's matrices lie, in elements: A [padded, in_features] at `a`, B [padded, out_features] at `b`.

    Scales, where the layout has them, are [padded] float32 at `scales`.
    """

    a: int
    b: int
    scales: int
    padded: int
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Layout:
    """The modules an adapter touches, their padded ranks, and the number format.

    Adapters of equal layout are interchangeable in memory. `sites` are indices into the model's list of
    adaptable modules, ascending. With scales, the low dimension is multiplied by them between A and B.
    """

    sites: tuple[tuple[int, int, int, int], ...]  # (site, padded rank, in_features, out_features)
    dtype: NumberFormat
    has_scales: bool = False

    @classmethod
    def of(
        cls,
        ranks: Mapping[int, int],
        shapes: Mapping[int, tuple[int, int]],
        dtype: NumberFormat,
        *,
        has_scales: bool = False,
    ) -> "Layout":
        """From each touched site's rank, and each site's (in_features, out_features)."""
        return cls(tuple((s, padded_rank(r), *shapes[s]) for s, r in sorted(ranks.items())), dtype, has_scales)

    @property
    def scale_elements(self) -> int:
        """Elements of the buffer that one float32 scale takes."""
        return 4 // ITEM_BYTES[self.dtype]

    @cached_property
    def extents(self) -> dict[int, Extent]:
        found: dict[int, Extent] = {}
        offset = 0
        for site, padded, in_features, out_features in self.sites:
            a = offset
            b = _aligned(a + padded * in_features)
            scales = _aligned(b + padded * out_features)
            offset = _aligned(scales + padded * self.scale_elements) if self.has_scales else scales
            found[site] = Extent(a, b, scales, padded, in_features, out_features)
        return found

    def parts(self) -> Iterator[tuple[int, int]]:
        """Every matrix, and every run of scales: where it begins and how many elements it has."""
        for extent in self.extents.values():
            yield extent.a, extent.padded * extent.in_features
            yield extent.b, extent.padded * extent.out_features
            if self.has_scales:
                yield extent.scales, extent.padded * self.scale_elements

    @cached_property
    def numel(self) -> int:
        """Elements of the whole buffer."""
        room = self.scale_elements if self.has_scales else 0
        return max((_aligned(e.scales + e.padded * room) for e in self.extents.values()), default=0)

    @property
    def size_bytes(self) -> int:
        return self.numel * ITEM_BYTES[self.dtype]

    def __hash__(self) -> int:
        return hash(self.sites)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN
