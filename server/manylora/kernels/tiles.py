"""Rows in tiles, for kernels that have a fixed number of rows at a time. On the host, and no torch."""

from dataclasses import dataclass

import numpy as np

from manylora.kernels.rows import LoraRows

__all__ = ["Tiles", "cut_tiles"]

_NO_TILES = np.zeros((0, 3), dtype=np.int32)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Pieces of the segments of a step, int32 [n, 3] each: a slot, a first place in `LoraRows.order`, how many rows.

    `single`: of sequences that have one row each; `many`: of all others. No piece has rows of both, so that what a row
    is multiplied with and in which order does not depend on the rows beside it.
    """

    single: np.ndarray
    many: np.ndarray


def cut_tiles(rows: LoraRows, single_rows: int, many_rows: int) -> Tiles:
    """Cut segments into pieces of at most `single_rows` and `many_rows` rows."""
    starts = np.asarray(rows.starts, dtype=np.int64)
    slots = np.asarray(rows.slots, dtype=np.int64)
    if rows.num_single is None:
        return Tiles(_pieces(slots, starts[:-1], starts[1:], single_rows), _NO_TILES)
    # Rows of a segment ascend, and those of sequences with one row are the step's first.
    singles = np.concatenate(([0], np.cumsum(rows.host_order < rows.num_single)))
    border = starts[:-1] + singles[starts[1:]] - singles[starts[:-1]]
    return Tiles(_pieces(slots, starts[:-1], border, single_rows), _pieces(slots, border, starts[1:], many_rows))


def _pieces(slots: np.ndarray, begins: np.ndarray, ends: np.ndarray, size: int) -> np.ndarray:
    counts = -(-(ends - begins) // size)
    owner = np.repeat(np.arange(len(slots)), counts)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    firsts = begins[owner] + number * size
    found = np.stack((slots[owner], firsts, np.minimum(ends[owner] - firsts, size)), axis=1)
    return found.astype(np.int32)
