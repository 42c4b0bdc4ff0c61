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

    def place(self, start: int, float_elements: int, *, has_scales: bool) -> Extent:
        """The term's extent from `start` on, which is aligned.

        `float_elements`: how many of the buffer's elements one float32 takes. `has_scales`: whether what matrices are
        multiplied by stays beside them.
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

    def place(self, start: int, float_elements: int, *, has_scales: bool) -> LowRankExtent:
        b = aligned(start + self.padded * self.in_features)
        scales = aligned(b + self.padded * self.out_features)
        scale_elements = float_elements if has_scales else 0
        return LowRankExtent(start, b, scales, self.padded, self.in_features, self.out_features, scale_elements)


@dataclass(frozen=True, slots=True)
class DenseExtent:
    """D [out_features, in_features] at `matrix` (an embedding's: [vocabulary, hidden]), and perhaps its rows' scales.

    The scales are float32, one for each row as stored.
    """

    matrix: int
    scales: int
    rows: int
    columns: int
    scale_elements: int

    @property
    def end(self) -> int:
        return aligned(self.scales + self.rows * self.scale_elements)

    def parts(self) -> Iterator[tuple[int, int]]:
        """D, and the scales where there are."""
        yield self.matrix, self.rows * self.columns
        if self.scale_elements:
            yield self.scales, self.rows * self.scale_elements


@dataclass(frozen=True, slots=True)
class DenseRoom:
    """Of a matrix that is added to the base's, stored in rows of `columns`."""

    rows: int
    columns: int

    def place(self, start: int, float_elements: int, *, has_scales: bool) -> DenseExtent:
        scales = aligned(start + self.rows * self.columns)
        return DenseExtent(start, scales, self.rows, self.columns, float_elements if has_scales else 0)


@dataclass(frozen=True, slots=True)
class TokenRowsExtent:
    """The rows of some tokens at `rows`: float32 [len(ids), width]."""

    rows: int
    ids: tuple[int, ...]
    width: int
    float_elements: int

    @property
    def end(self) -> int:
        return aligned(self.rows + len(self.ids) * self.width * self.float_elements)

    def parts(self) -> Iterator[tuple[int, int]]:
        yield self.rows, len(self.ids) * self.width * self.float_elements


@dataclass(frozen=True, slots=True)
class TokenRowsRoom:
    """Of what is added to the rows of the tokens `ids`, ascending, of `width` each: float32 in every buffer."""

    ids: tuple[int, ...]
    width: int

    def place(self, start: int, float_elements: int, *, has_scales: bool) -> TokenRowsExtent:
        return TokenRowsExtent(start, self.ids, self.width, float_elements)


@dataclass(frozen=True, slots=True)
class InputExtent:
    """What an input is multiplied by at `scale`: float32 [width]."""

    scale: int
    width: int
    float_elements: int

    @property
    def end(self) -> int:
        return aligned(self.scale + self.width * self.float_elements)

    def parts(self) -> Iterator[tuple[int, int]]:
        yield self.scale, self.width * self.float_elements


@dataclass(frozen=True, slots=True)
class InputRoom:
    """Of a vector by which an input of `width` is multiplied, float32 in every buffer."""

    width: int

    def place(self, start: int, float_elements: int, *, has_scales: bool) -> InputExtent:
        return InputExtent(start, self.width, float_elements)


@dataclass(frozen=True, slots=True)
class OutputExtent:
    """What an output is multiplied by at `scale`, what is added to it at `shift`: float32 [width] each, or None."""

    scale: int | None
    shift: int | None
    width: int
    float_elements: int
    end: int

    def parts(self) -> Iterator[tuple[int, int]]:
        """Where the scale and the shift begin, with the length of each; what is not there is left out."""
        for at in (self.scale, self.shift):
            if at is not None:
                yield at, self.width * self.float_elements


@dataclass(frozen=True, slots=True)
class OutputRoom:
    """Of vectors that change an output of `width`, float32 in every buffer."""

    width: int
    has_scale: bool
    has_shift: bool

    def place(self, start: int, float_elements: int, *, has_scales: bool) -> OutputExtent:
        shift = aligned(start + self.width * float_elements) if self.has_scale else start
        end = aligned(shift + self.width * float_elements) if self.has_shift else shift
        return OutputExtent(
            start if self.has_scale else None, shift if self.has_shift else None, self.width, float_elements, end
        )


@dataclass(frozen=True, slots=True)
class PrefixExtent:
    """Virtual tokens: their `embeddings` float32 [count, width], or None, and at `past` what layers make of them.

    `past` is float32 [count, past_width].
    """

    embeddings: int | None
    past: int
    count: int
    width: int
    past_width: int
    float_elements: int

    @property
    def end(self) -> int:
        return aligned(self.past + self.count * self.past_width * self.float_elements)

    def parts(self) -> Iterator[tuple[int, int]]:
        """The embeddings where there are, and the past."""
        if self.embeddings is not None:
            yield self.embeddings, self.count * self.width * self.float_elements
        yield self.past, self.count * self.past_width * self.float_elements


@dataclass(frozen=True, slots=True)
class PrefixRoom:
    """Of virtual tokens, float32 in every buffer. `width`: of their embeddings, 0 where they bring their past."""

    count: int
    width: int
    past_width: int

    def place(self, start: int, float_elements: int, *, has_scales: bool) -> PrefixExtent:
        past = aligned(start + self.count * self.width * float_elements)
        at = start if self.width else None
        return PrefixExtent(at, past, self.count, self.width, self.past_width, float_elements)
