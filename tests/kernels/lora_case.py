"""Random adapters in the kernel's tables, batches of rows over them, and the plain torch answer."""

from dataclasses import dataclass

import numpy as np
import torch

from loadtest.popularity import Popularity

POPULARITIES = ("identical", "distinct", "uniform", "zipf", "skewed", "base")


def draw_slots(popularity: str, num_rows: int, num_slots: int, generator: torch.Generator) -> torch.Tensor:
    """Each row's slot, -1 for the base; the highest slot holds the most popular adapter."""
    if popularity == "base":
        return torch.where(torch.arange(num_rows) % 3 == 0, 0, -1)
    rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
    drawn = Popularity.model_validate({"kind": popularity}).draw(num_slots, num_rows, rng)
    return torch.from_numpy(num_slots - 1 - drawn)


@dataclass
class LoraCase:
    """`weights[member][slot]`: (A, B), or None where the slot's adapter does not touch the member."""

    x: torch.Tensor
    out: torch.Tensor
    weights: list[list[tuple[torch.Tensor, torch.Tensor] | None]]
    offsets: list[int]
    row_slots: torch.Tensor

    @property
    def tables(self) -> torch.Tensor:
        return torch.tensor(
            [[(p[0].data_ptr(), p[1].data_ptr(), len(p[0])) if p else (0, 0, 0) for p in m] for m in self.weights]
        )

    def arguments(self) -> tuple[torch.Tensor, ...]:
        """What follows `out` and `x` in the operator's arguments."""
        order = torch.argsort(self.row_slots, stable=True)
        order = order[self.row_slots[order] >= 0]
        slots, counts = torch.unique_consecutive(self.row_slots[order], return_counts=True)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        offsets = torch.tensor(self.offsets, dtype=torch.int32)
        return (self.tables, offsets, order.int(), slots.int(), starts.int())

    def expected(self) -> torch.Tensor:
        """The definition, row by row, in float64."""
        result = self.out.double()
        for t, slot in enumerate(self.row_slots.tolist()):
            for m, member in enumerate(self.weights):
                pair = member[slot] if slot >= 0 else None
                if pair is not None:
                    columns = slice(self.offsets[m], self.offsets[m + 1])
                    result[t, columns] += pair[0].double() @ self.x[t].double() @ pair[1].double()
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
) -> LoraCase:
    """One adapter per entry of `ranks`, 0 for one that touches no member; the first member lacks the last adapter."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    weights: list[list[tuple[torch.Tensor, torch.Tensor] | None]] = []
    for width in widths:
        pairs = [(normal(r, in_features) / in_features**0.5, normal(r, width) / max(r, 1) ** 0.5) for r in ranks]
        weights.append([pair if len(pair[0]) else None for pair in pairs])
    if len(widths) > 1:
        weights[0][-1] = None
    offsets = [sum(widths[:m]) for m in range(len(widths) + 1)]
    slots = draw_slots(popularity, rows, len(ranks), g)
    return LoraCase(normal(rows, in_features), normal(rows, offsets[-1]), weights, offsets, slots)
