"""Hidden states of a prompt's tokens become one vector, however its tokens are spread over steps."""

from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

from manylora.engine.interface import Pooling

__all__ = ["Pool"]

_ROWS_AT_ONCE: Final = 64  # made float64 together


class Pool:
    """The pool of a decoder's prompt. It is told rows float32 [n, hidden] in the order of the prompt's tokens.

    A mean's sum goes from one row to the next, so it is the same to the last bit whatever pieces the rows come in.
    """

    def __init__(self, how: Pooling) -> None:
        self._how = how
        self._num_rows = 0
        self._sum: npt.NDArray[np.float64] | None = None

    def add(self, pieces: Iterable[npt.NDArray[np.float32]]) -> None:
        for piece in pieces:
            self._num_rows += len(piece)
            if self._how == "last":
                self._sum = piece[-1].astype(np.float64)
                continue
            for start in range(0, len(piece), _ROWS_AT_ONCE):
                rows = piece[start : start + _ROWS_AT_ONCE].astype(np.float64)
                if self._sum is not None:
                    rows[0] += self._sum
                self._sum = np.add.accumulate(rows, axis=0)[-1].copy()

    @property
    def vector(self) -> npt.NDArray[np.float32]:
        """The last row, or the mean of all; float32 [hidden]."""
        assert self._sum is not None, "a prompt has a token"
        return (self._sum if self._how == "last" else self._sum / self._num_rows).astype(np.float32)
