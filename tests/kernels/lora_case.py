"""Random adapters in the kernel's tables, batches of rows over them, and the plain torch answer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from manylora.kernels.reference import Dense, LowRank, add_lora
from manylora.lora.memory.device_memory import DTYPE_CODES, DeviceMemory, TableEntry
from manylora_loadtest.popularity import Popularity

DENSE = -1
POPULARITIES = ("identical", "distinct", "uniform", "zipf", "skewed", "base")


def draw_slots(popularity: str, num_rows: int, num_slots: int, generator: torch.Generator) -> torch.Tensor:
    """Each row's slot, -1 for the base; the highest slot holds the most popular adapter."""
    if popularity == "base":
        return torch.where(torch.arange(num_rows) % 3 == 0, 0, -1)
    rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
    drawn = Popularity.model_validate({"kind": popularity}).draw(num_slots, num_rows, rng)
    return torch.from_numpy(num_slots - 1 - drawn)


@dataclass
class Weights:
    """A [r, in_features] and B [r, width] as the kernel reads them, and perhaps scales [r]."""

    a: torch.Tensor
    b: torch.Tensor | None  # None: A is a dense matrix, with a row for each output
    scales: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Weights":
        b, scales = (None if each is None else each.to(device) for each in (self.b, self.scales))
        return Weights(self.a.to(device), b, scales)

    def entry(self) -> TableEntry:
        """An entry of the kernel's tables."""
        scales = 0 if self.scales is None else self.scales.data_ptr()
        rank, in_features = self.a.shape
        code = DTYPE_CODES[self.a.dtype]
        if self.b is None:
            return TableEntry(self.a.data_ptr(), 0, rank, scales, code, in_features, rank)
        return TableEntry(self.a.data_ptr(), self.b.data_ptr(), rank, scales, code, in_features, self.b.shape[1])

    def reference(self) -> LowRank | Dense:
        return Dense(self.a, self.scales) if self.b is None else LowRank(self.a, self.b, self.scales)


@dataclass
class LoraCase:
    """`weights[member][slot]` is None where the slot's adapter does not touch the member."""

    x: torch.Tensor
    out: torch.Tensor
    weights: list[list[Weights | None]]
    offsets: list[int]
    row_slots: torch.Tensor

    @property
    def tables(self) -> torch.Tensor:
        return torch.tensor([[each.entry() if each else TableEntry() for each in m] for m in self.weights])

    def to(self, device: torch.device) -> "LoraCase":
        """The same on a device."""
        weights = [[each and each.to(device) for each in member] for member in self.weights]
        return replace(self, x=self.x.to(device), out=self.out.to(device), weights=weights)

    def memory(self, device: torch.device) -> DeviceMemory:
        """The adapters, which are on the device, each in a slot of its number."""
        memory = DeviceMemory(len(self.weights), len(self.weights[0]), device)
        memory.tables = self.tables.to(device)
        for member, slots in enumerate(self.weights):
            for slot, each in enumerate(slots):
                if each is not None:
                    memory.touches[member, slot] = True
                    memory.formats[slot] = DTYPE_CODES[each.a.dtype]
                    memory.has_dense[member, slot] = each.b is None
                    memory.ranks[member, slot] = 0 if each.b is None else len(each.a)
        return memory

    def only(self, rows: slice) -> "LoraCase":
        """The same with some of the rows."""
        return replace(self, x=self.x[rows], out=self.out[rows], row_slots=self.row_slots[rows])

    def arguments(self) -> tuple[torch.Tensor, ...]:
        """What follows `out` and `x` in the operator's arguments."""
        order = torch.argsort(self.row_slots, stable=True)
        order = order[self.row_slots[order] >= 0]
        slots, counts = torch.unique_consecutive(self.row_slots[order], return_counts=True)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        offsets = torch.tensor(self.offsets, dtype=torch.int32)
        return (self.tables, offsets, order.int(), slots.int(), starts.int())

    def expected(self) -> torch.Tensor:
        """The specification, member by member."""
        result = self.out.double()
        for m, member in enumerate(self.weights):
            columns = slice(self.offsets[m], self.offsets[m + 1])
            pairs = [each.reference() if each else None for each in member]
            result[:, columns] = add_lora(self.out[:, columns], self.x, pairs, self.row_slots.tolist())
        return result


def make_case(
    dtype: torch.dtype,
    ranks: list[int],
    *,
    in_features: int = 96,
    widths: tuple[int, ...] = (64,),
    rows: int = 8,
    popularity: str = "uniform",
    seed: int = 0,
    weight_dtypes: Sequence[torch.dtype] = (),
) -> LoraCase:
    """One adapter per entry of `ranks`, 0 for one that touches no member; the first member lacks the last adapter.

    An adapter whose rank is `DENSE` has a dense matrix for each member.
    `weight_dtypes` are the adapters', in turn; left out: x's and out's `dtype`, without scales.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    def drawn(slot: int, rank: int, width: int) -> Weights:
        if rank == DENSE:
            matrix, scales = normal(width, in_features) / in_features**0.5, torch.rand(width, generator=g)
            kind = weight_dtypes[slot % len(weight_dtypes)] if weight_dtypes else dtype
            step = matrix.abs().max() / 127 if kind == torch.int8 else 1.0
            return Weights((matrix / step).to(kind), None, scales * float(step) if weight_dtypes else None)
        a, b = normal(rank, in_features) / in_features**0.5, normal(rank, width) / max(rank, 1) ** 0.5
        if not weight_dtypes:
            return Weights(a, b)
        kind, scales = weight_dtypes[slot % len(weight_dtypes)], torch.rand(rank, generator=g)
        if kind != torch.int8:
            return Weights(a.to(kind), b.to(kind), scales)
        step_a, step_b = a.abs().max() / 127, b.abs().max() / 127
        return Weights((a / step_a).to(kind), (b / step_b).to(kind), scales * (step_a * step_b).float())

    weights = [[drawn(slot, rank, width) if rank else None for slot, rank in enumerate(ranks)] for width in widths]
    if len(widths) > 1:
        weights[0][-1] = None
    offsets = [sum(widths[:m]) for m in range(len(widths) + 1)]
    slots = draw_slots(popularity, rows, len(ranks), g)
    return LoraCase(normal(rows, in_features), normal(rows, offsets[-1]), weights, offsets, slots)
