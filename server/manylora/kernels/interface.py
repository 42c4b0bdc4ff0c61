"""What a kernel has to offer: low-rank deltas and attention, each one specification behind one small protocol."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from manylora.kernels.rows import LoraRows
from manylora.lora.memory.device_memory import DeviceMemory

if TYPE_CHECKING:
    from manylora.kernels.batch import AttentionOptions, Batch


@dataclass(frozen=True, slots=True)
class SiteGroup:
    """Consecutive sites that share their input and write side by side: q, k and v, or gate and up, or just one.

    `offsets` are the column bounds, [members + 1]; `offsets_i32` the same on the device.
    """

    first: int
    offsets: tuple[int, ...]
    offsets_i32: torch.Tensor

    @property
    def sites(self) -> range:
        return range(self.first, self.first + len(self.offsets) - 1)


class LoraPlan(Protocol):
    """One step's rows, ready to be applied in every layer."""

    rows: LoraRows

    def add_(self, out: torch.Tensor, x: torch.Tensor, group: SiteGroup) -> None:
        """`out` [T, columns] += each row's delta of `x` [T, in_features], in place; see `reference.add_lora`."""
        ...

    def add_embedding_(self, out: torch.Tensor, token_ids: torch.Tensor, site: int) -> None:
        """`out` [T, hidden] += each token's low-rank embedding delta, for `token_ids` [T]."""
        ...


class LoraKernel(Protocol):
    """An implementation of the low-rank deltas.

    `places_per_slab` is how many adapters of one layout it wants side by side; `mixes_dtypes` whether it multiplies
    weights of another type than the model's as they are, instead of converting them in every step.
    """

    places_per_slab: int
    mixes_dtypes: bool

    def plan(self, rows: LoraRows, memory: DeviceMemory) -> LoraPlan: ...


class Attention(Protocol):
    """An implementation of paged attention, with what it keeps between the layers of a step: one per wrapped model."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        batch: "Batch",
        options: "AttentionOptions",
    ) -> torch.Tensor:
        """Store the step's k, v [T, kv_heads, head_dim] in a layer's cache and attend to it, q -> [T, heads, head_dim].

        `keys`, `values` [blocks, kv_heads, block_size, head_dim]; see `reference.write_kv` and `reference.attention`.
        """
        ...


def add_embedding_(out: torch.Tensor, token_ids: torch.Tensor, site: int, rows: LoraRows, memory: DeviceMemory) -> None:
    """The embedding's delta, one look-up per adapter present: one such module per model, so a loop will do."""
    for index, slot in enumerate(rows.slots):
        mine = rows.order[rows.starts[index] : rows.starts[index + 1]].long()
        pair = memory.embedding_matrices(slot, site, token_ids[mine])
        if pair is not None:
            a, b = pair
            out.index_add_(0, mine, a.to(out.dtype) @ b.to(out.dtype))
