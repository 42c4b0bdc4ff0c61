"""What a kernel has to offer: low-rank deltas and attention, each one specification behind one small protocol."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from manylora.kernels.rows import LoraRows, MixedRows, Parts, group_rows
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
    """One step's rows, ready to be applied in every layer.

    `own_logits`: once the head has run, by row the logits of tokens that the row's adapter alone has, float32 [n].
    """

    rows: LoraRows
    own_logits: dict[int, torch.Tensor]

    def add_(self, out: torch.Tensor, x: torch.Tensor, group: SiteGroup, given: torch.Tensor | None = None) -> None:
        """What each row's adapters do to the product of `x` [T, in_features], in place in `out` [T, columns].

        Of a row's one adapter the delta is added (`reference.add_lora`), and then the output changed
        (`reference.change_output`); of a mix `reference.add_mixes`. `given`: x before `change_input_`, where it was
        called.
        """
        ...

    def add_embedding_(self, out: torch.Tensor, token_ids: torch.Tensor, group: SiteGroup, scale: float) -> None:
        """What each row's adapters do to the embeddings `out` [T, hidden] of `token_ids` [T], in place.

        Some embeddings scale their rows (Gemma's), and PEFT scales the delta alike: by `scale`.
        """
        ...

    def add_own_tokens_(self, out: torch.Tensor, token_ids: torch.Tensor, group: SiteGroup, scale: float) -> None:
        """`out` [T, hidden] += `scale` times the rows of tokens that the base has not; -1 in `token_ids` is none."""
        ...

    def add_experts_(
        self, out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, bounds: list[int], site: int
    ) -> None:
        """`out` [P, out] += each pair's delta, of pairs of a row and an expert whose input is `x` [P, in].

        `rows` int64 [P]: the row of each. Pairs stand in the order of their experts, whose last ones end at `bounds`.
        """
        ...

    def change_output_(self, out: torch.Tensor, group: SiteGroup) -> None:
        """The second half of `add_` alone, and what a mix does to an output to which it adds nothing."""
        ...

    def change_input_(self, x: torch.Tensor, group: SiteGroup) -> None:
        """Each row of `x` [T, in_features], in place, as its adapter changes what goes into a group of one site."""
        ...


class LoraKernel(Protocol):
    """An implementation of the low-rank deltas.

    `places_per_slab` is how many adapters of one layout it wants side by side; `mixes_dtypes` whether it multiplies
    weights of another type than the model's as they are, instead of converting them in every step.
    """

    places_per_slab: int
    mixes_dtypes: bool

    def plan(self, rows: LoraRows, memory: DeviceMemory) -> LoraPlan: ...


def plan_of(
    kernel: LoraKernel,
    memory: DeviceMemory,
    row_slots: np.ndarray,
    mixes: Sequence[Parts] = (),
    num_single: int | None = None,
) -> LoraPlan | None:
    """What the kernel is to do for rows with these slots (`rows.group_rows`); None where no row has an adapter."""
    rows = group_rows(
        row_slots,
        memory.touches,
        memory.device,
        inputs=memory.inputs.flags,
        outputs=memory.outputs.flags,
        mixes=mixes,
        num_single=num_single,
    )
    return kernel.plan(rows, memory) if rows is not None else None


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
        """Store the step's k, v [T, kv_heads, their width] in a layer's cache and attend to it.

        q [T, heads, keys' width] -> [T, heads, values' width]. `keys`, `values` [blocks, kv_heads, block_size, their
        width], of a rounded cache their entries' (`kv_entries`); see `reference.write_kv` and `reference.attention`.
        """
        ...


def add_embedding_(
    out: torch.Tensor, token_ids: torch.Tensor, site: int, scale: float, rows: LoraRows, memory: DeviceMemory
) -> None:
    """The embedding's delta times `scale`, one look-up per adapter present: one such module per model."""
    total = torch.zeros_like(out)
    for slot, mine in segments(rows):
        pair = memory.embedding_matrices(slot, site, token_ids[mine])
        if pair is not None:
            a, b = pair
            total.index_add_(0, mine, weighted_sums(b.to(out.dtype), a.to(out.dtype)))
        dense = memory.dense(slot, site)
        if dense is not None:
            matrix, scales = dense
            delta = matrix[token_ids[mine]].to(out.dtype)
            total.index_add_(0, mine, delta if scales is None else delta * scales[token_ids[mine], None].to(out.dtype))
    out += total * scale


def weighted_sums(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`weights` [n, r] times `rows` [r, width], each of the n by itself: it does not depend on how many they are."""
    count, rank = weights.shape
    indices = torch.arange(rank, device=rows.device).repeat(count)
    starts = torch.arange(0, count * rank, rank, device=rows.device)
    found: torch.Tensor = torch.embedding_bag(rows.contiguous(), indices, starts, False, 0, False, weights.flatten())[0]
    return found


def add_experts_(
    out: torch.Tensor,
    x: torch.Tensor,
    pair_rows: torch.Tensor,
    bounds: list[int],
    site: int,
    rows: LoraRows,
    memory: DeviceMemory,
) -> None:
    """The deltas of experts, one adapter and one expert after the other: few of each meet in a step."""
    for slot, weight, mine in _weighted(rows):
        found = memory.experts(slot, site, len(bounds))
        if found is None:
            continue
        a, b, scales = found  # [experts, r, in], [experts, r, out], [experts, r] or None
        places = torch.isin(pair_rows, mine).nonzero()[:, 0]
        ends = torch.searchsorted(places, torch.tensor(bounds, device=places.device)).tolist()
        begin = 0
        for expert, end in enumerate(ends):
            if begin < end:
                own = places[begin:end]
                low = x[own] @ a[expert].to(x.dtype).T
                low = low if scales is None else low * scales[expert].to(x.dtype)
                delta = (low @ b[expert].to(x.dtype)).to(out.dtype)
                out[own] += delta if weight == 1.0 else delta * weight
            begin = end


def change_output_(out: torch.Tensor, group: SiteGroup, rows: LoraRows, memory: DeviceMemory) -> None:
    """`reference.change_output` for each member of a group, one adapter after the other."""
    for member, site in enumerate(group.sites):
        if rows.changed is None or not rows.changed.outputs[site]:
            continue
        columns = slice(group.offsets[member], group.offsets[member + 1])
        for slot, mine in segments(rows):
            vectors = memory.output(slot, site)
            if vectors is not None:
                scale, shift = vectors
                found = out[mine, columns].float()
                found = found if scale is None else found * scale
                out[mine, columns] = (found if shift is None else found + shift).to(out.dtype)


def change_input_(x: torch.Tensor, group: SiteGroup, rows: LoraRows, memory: DeviceMemory) -> None:
    """Each row of `x` times what its adapter scales the site's input by."""
    for slot, mine in segments(rows):
        scale = memory.input(slot, group.first)
        if scale is not None:
            x[mine] = (x[mine].float() * scale).to(x.dtype)


def segments(rows: LoraRows) -> Iterator[tuple[int, torch.Tensor]]:
    """Each slot of a step and its rows, int64."""
    for index, slot in enumerate(rows.slots):
        yield slot, rows.order[rows.starts[index] : rows.starts[index + 1]].long()


def _weighted(rows: LoraRows) -> Iterator[tuple[int, float, torch.Tensor]]:
    """Each slot of a step, a weight and rows, int64: those of adapters as they are, and then those of mixes."""
    for slot, mine in segments(rows):
        yield slot, 1.0, mine
    for parts, mine in mixed_segments(rows.mixes) if rows.mixes is not None else ():
        for slot, weight in parts:
            yield slot, weight, mine


def mixed_segments(mixes: MixedRows) -> Iterator[tuple[Parts, torch.Tensor]]:
    """Each mix and its rows, int64."""
    for index, parts in enumerate(mixes.parts):
        yield parts, mixes.order[mixes.starts[index] : mixes.starts[index + 1]].long()
