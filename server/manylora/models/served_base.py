"""The base's weights as they are served, for terms of adapters that are made with them.

They are read back out of the form that the kernels want, a part at a time, so that no second copy of the base stays.
What is served is what counts: where a base was rounded to 8 bits, an adapter is made for the rounded one.
"""

import copy
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import nn

from manylora.kernels.matmul import BaseMatmul, ReadableMatmul
from manylora.lora.format.spec import Floats

__all__ = ["ServedEmbedding", "ServedLinear", "ServedModule", "ServedNorm"]

ROWS_AT_A_TIME = 1024


class ServedModule:
    """Implements `lora.format.spec.BaseLinear` over rows that a subclass reads. Thread-safe."""

    weight_offset = 0.0

    def __init__(self, out_features: int, in_features: int, bias: torch.Tensor | None) -> None:
        self._shape = out_features, in_features
        self._bias = bias
        self._lock = threading.Lock()

    def read(self, begin: int, end: int) -> torch.Tensor:
        """Rows of the weight, [end - begin, in_features], of any float dtype on any device."""
        raise NotImplementedError

    @property
    def bias(self) -> Floats | None:
        return None if self._bias is None else _array(self._bias)

    def weight(self) -> Floats:
        return np.concatenate([rows for _, rows in self._pieces()])

    def project(self, rows: Floats) -> Floats:
        found = np.empty((len(rows), self._shape[0]), dtype=np.float32)
        for begin, piece in self._pieces():
            found[:, begin : begin + len(piece)] = rows @ piece.T
        return found

    def token_rows(self, ids: Sequence[int]) -> Floats:
        found = np.zeros((len(ids), self._shape[1]), dtype=np.float32)
        for place, each in enumerate(ids):
            if each < self._shape[0]:
                found[place] = _array(self.read(each, each + 1))[0]
        return found

    def squared_norms(self) -> Floats:
        with self._lock:
            return self._squared_norms

    @cached_property
    def _squared_norms(self) -> Floats:
        return np.concatenate([np.einsum("ij,ij->i", rows, rows) for _, rows in self._pieces()])

    def _pieces(self) -> Iterator[tuple[int, Floats]]:
        for begin in range(0, self._shape[0], ROWS_AT_A_TIME):
            yield begin, _array(self.read(begin, min(begin + ROWS_AT_A_TIME, self._shape[0])))


class ServedLinear(ServedModule):
    """A linear, whose outputs are those from `first` on of a product that several linears may share."""

    def __init__(
        self, matmul: BaseMatmul, first: int, out_features: int, in_features: int, bias: torch.Tensor | None
    ) -> None:
        super().__init__(out_features, in_features, bias)
        self._matmul = matmul
        self._first = first

    def read(self, begin: int, end: int) -> torch.Tensor:
        matmul, in_features = self._matmul, self._shape[1]
        if isinstance(matmul, ReadableMatmul):
            return matmul.rows(self._first + begin, self._first + end, in_features)
        # Of any other product, what it makes of the unit vectors.
        columns = matmul(torch.eye(in_features)) - matmul(torch.zeros(1, in_features))
        return columns.T[self._first + begin : self._first + end]


class ServedEmbedding(ServedModule):
    """An embedding as a linear of one-hot rows: [hidden, vocabulary]."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__(table.shape[1], table.shape[0], None)
        self._table = table

    def read(self, begin: int, end: int) -> torch.Tensor:
        return self._table[:, begin:end].T

    def token_rows(self, ids: Sequence[int]) -> Floats:
        found = np.zeros((len(ids), self._shape[0]), dtype=np.float32)
        known = [place for place, each in enumerate(ids) if each < len(self._table)]
        found[known] = _array(self._table[[ids[place] for place in known]])
        return found


class ServedNorm(ServedModule):
    """A norm's gain: [width, 1], what its weight comes to with the offset that some models add to it."""

    def __init__(self, module: nn.Module) -> None:
        weight, bias = module.weight, module.bias if isinstance(getattr(module, "bias", None), torch.Tensor) else None
        assert isinstance(weight, torch.Tensor)
        super().__init__(weight.shape[0], 1, bias.detach() if isinstance(bias, torch.Tensor) else None)
        self._weight = weight.detach()
        self.weight_offset = _weight_offset(module)

    def read(self, begin: int, end: int) -> torch.Tensor:
        return self._weight[begin:end, None].float() + self.weight_offset


@torch.inference_mode()
def _weight_offset(module: nn.Module) -> float:
    """What a norm adds to its weight (Gemma's: 1): with a weight of zeros, and no bias, that alone is left."""
    without = copy.deepcopy(module)
    for parameter in without.parameters():
        parameter.zero_()
    assert isinstance(module.weight, torch.Tensor)
    ones = torch.ones_like(module.weight)
    ones[::2] = -1.0  # of mean zero, for norms that take it off
    return float(without(ones[None])[0, 1].round())


def _array(values: torch.Tensor) -> Floats:
    found: Floats = values.detach().float().cpu().contiguous().numpy()
    return found
