"""How one adapter lies in memory: the terms of every module one after the other in a flat buffer.

Host and device hold adapters in the same layout, so bringing one to the device is a single copy.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from manylora.lora.memory.terms import (
    ITEM_BYTES,
    DenseExtent,
    Extent,
    InputExtent,
    LowRankExtent,
    LowRankRoom,
    NumberFormat,
    OutputExtent,
    PrefixExtent,
    Room,
    TokenRowsExtent,
    padded_rank,
)

E = TypeVar("E")


@dataclass(frozen=True)
class Layout:
    """The modules an adapter touches, the rooms of their terms, and the number format.

    Adapters of equal layout are interchangeable in memory. `rooms` has (site, room) in the order of the buffer; a site
    is an index into the model's list of adaptable modules, and may have terms of several classes. With scales, what a
    term is multiplied by stays beside it, in float32.
    """

    rooms: tuple[tuple[int, Room], ...]
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
        """Of low-rank terms alone: from each touched site's rank, and each site's (in_features, out_features)."""
        rooms = ((site, LowRankRoom(padded_rank(rank), *shapes[site])) for site, rank in sorted(ranks.items()))
        return cls(tuple(rooms), dtype, has_scales)

    @property
    def sites(self) -> list[int]:
        """Every site that it touches, once for each term; virtual tokens touch none."""
        return [site for site, extent in self.placed if not isinstance(extent, PrefixExtent)]

    @property
    def float_elements(self) -> int:
        """Elements of the buffer that one float32 takes."""
        return 4 // ITEM_BYTES[self.dtype]

    @cached_property
    def placed(self) -> tuple[tuple[int, Extent], ...]:
        """Where each term lies, by site, in the order of `rooms`."""
        found: list[tuple[int, Extent]] = []
        offset = 0
        for site, room in self.rooms:
            extent = room.place(offset, self.float_elements, has_scales=self.has_scales)
            found.append((site, extent))
            offset = extent.end
        return tuple(found)

    @cached_property
    def low_rank(self) -> dict[int, LowRankExtent]:
        """Where each site's low-rank term lies, of those that have one."""
        return self._of(LowRankExtent)

    @cached_property
    def dense(self) -> dict[int, DenseExtent]:
        """Where each site's dense term lies, of those that have one."""
        return self._of(DenseExtent)

    @cached_property
    def token_rows(self) -> dict[int, TokenRowsExtent]:
        """Where each site's rows of some tokens lie, of those that have such a term."""
        return self._of(TokenRowsExtent)

    @cached_property
    def inputs(self) -> dict[int, InputExtent]:
        """Where what changes each site's input lies, of those that have such a term."""
        return self._of(InputExtent)

    @cached_property
    def outputs(self) -> dict[int, OutputExtent]:
        """Where what changes each site's output lies, of those that have such a term."""
        return self._of(OutputExtent)

    @cached_property
    def prefix(self) -> PrefixExtent | None:
        """Where its virtual tokens lie, if it has some."""
        return next((extent for _, extent in self.placed if isinstance(extent, PrefixExtent)), None)

    def _of(self, kind: type[E]) -> dict[int, E]:
        return {site: extent for site, extent in self.placed if isinstance(extent, kind)}

    def parts(self) -> Iterator[tuple[int, int]]:
        """Every part of every term: where it begins and how many elements it has."""
        for _, extent in self.placed:
            yield from extent.parts()

    @cached_property
    def numel(self) -> int:
        """Elements of the whole buffer."""
        return self.placed[-1][1].end if self.placed else 0

    @property
    def size_bytes(self) -> int:
        return self.numel * ITEM_BYTES[self.dtype]

    def __hash__(self) -> int:
        return hash(self.rooms)
