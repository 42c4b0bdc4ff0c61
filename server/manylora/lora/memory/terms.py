"""What a term of an adapter takes in memory. Bookkeeping only, no tensors.

A term has a room: its sizes. Two adapters whose rooms are equal are interchangeable in memory. In a buffer the room
becomes an extent: where each of the term's parts begins. How numbers are written there is `packing`'s, how kernels are
told where they are is `device_memory`'s.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, Protocol

NumberFormat = Literal["float32", "bfloat16", "float16", "int8"]
ITEM_BYTES: Final[Mapping[NumberFormat, int]] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
RANK_STEP: Final = 8
_ALIGN: Final = 64  # elements: every part starts on a cache line, in int8 too


def padded_rank(rank: int) -> int:
    """The rank an adapter occupies: 4, or the next multiple of 8. Padding rows are zero and never read."""
    return 4 if rank <= 4 else -(-rank // RANK_STEP) * RANK_STEP


def aligned(offset: int) -> int:
    """The first place at or behind `offset`, in elements, where a part may begin."""
    return -(-offset // _ALIGN) * _ALIGN


class Extent(Protocol):
    """Where a term lies in an adapter's buffer, in elements."""

    @property
    def end(self) -> int:
        """Behind its last part, aligned."""
        ...

    def parts(self) -> Iterator[tuple[int, int]]:
        """Each part: where it begins and how many elements it has."""
        ...


class Room(Protocol):
    """The sizes of a term. Hashable."""

    def place(self, start: int, scale_elements: int) -> Extent:
        """The term's extent from `start` on, which is aligned.

        `scale_elements`: how many elements one float32 scale takes, 0 in a buffer that keeps none.
        """
        ...


@dataclass(frozen=True, slots=True)
class LowRankExtent:
    """A [padded, in_features] at `a`, B [padded, out_features] at `b`, and where there are scales [padded] float32."""

    a: int
    b: int
    scales: int
    padded: int
    in_features: int
    out_features: int
    scale_elements: int

    @property
    def end(self) -> int:
        return aligned(self.scales + self.padded * self.scale_elements)

    def parts(self) -> Iterator[tuple[int, int]]:
        """A, B, and the scales where there are."""
        yield self.a, self.padded * self.in_features
        yield self.b, self.padded * self.out_features
        if self.scale_elements:
            yield self.scales, self.padded * self.scale_elements


@dataclass(frozen=True, slots=True)
class LowRankRoom:
    """Of a low-rank term, whose low dimension is multiplied by scales between A and B where the buffer keeps them."""

    padded: int
    in_features: int
    out_features: int

    def place(self, start: int, scale_elements: int) -> LowRankExtent:
        b = aligned(start + self.padded * self.in_features)
        scales = aligned(b + self.padded * self.out_features)
        return LowRankExtent(start, b, scales, self.padded, self.in_features, self.out_features, scale_elements)
