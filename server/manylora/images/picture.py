"""An image as a model sees it, and what callers of a model of images need to know."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from manylora.images.reading import read

__all__ = ["Picture", "Pixels", "Vision"]

Pixels = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """An image as a model sees it: float32 [channels, height, width], which becomes `num_positions` positions."""

    pixels: Pixels
    num_positions: int

    @property
    def ids(self) -> tuple[int, ...]:
        """Zeros that stand in a batch for the positions, where a text has token ids."""
        return (0,) * self.num_positions

    def upside_down(self) -> "Picture":
        """Another one of the same size."""
        return Picture(np.ascontiguousarray(self.pixels[:, ::-1]), self.num_positions)


@dataclass(frozen=True, slots=True, eq=False)
class Vision:
    """How a model of images sees: `prepare` makes of an RGB image (Pillow's) its pixels, [channels, height, width]
    whatever size the image has, of `num_bytes`, and each becomes `num_positions` positions. Used by several threads.
    """

    num_positions: int
    num_bytes: int
    prepare: Callable[[Any], Pixels]

    def picture(self, data: bytes) -> Picture:
        """What the model sees of a stranger's file. Raises InvalidImage."""
        return Picture(self.prepare(read(data)), self.num_positions)
