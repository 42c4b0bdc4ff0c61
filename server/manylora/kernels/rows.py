"""Which rows of a step belong to which adapter, worked out once per step and used by every layer."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

Parts: TypeAlias = Sequence[tuple[int, float]]
"""What the rows of one mix have: slots, each with its weight."""


@dataclass(frozen=True, slots=True)
class ChangedSites:
    """Per site, whether any adapter of a step changes what goes into it, and what comes out after the deltas."""

    inputs: list[bool]
    outputs: list[bool]


@dataclass(frozen=True, slots=True)
class MixedRows:
    """Rows that have several adapters, or one with a weight, grouped by mix.

    `order` int32 [R]: these rows, sorted by mix; `row_starts` int32 [M + 1]: each mix's run in it. `part_slots` int32
    [P], `part_weights` float32 [P]: the adapters of all mixes; `part_starts` int32 [M + 1]: each mix's run in these.
    `touched`, `changed`: as of `LoraRows`, for the adapters of mixes.
    """

    order: torch.Tensor
    row_starts: torch.Tensor
    part_starts: torch.Tensor
    part_slots: torch.Tensor
    part_weights: torch.Tensor
    touched: list[bool]
    changed: ChangedSites | None
    parts: tuple[Parts, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoraRows:
    """Rows grouped by slot.

    `order` int32 [R]: the rows that have one adapter as it is, sorted by slot, in their own order within one.
    `segment_slots` int32 [S]: each segment's slot. `segment_starts` int32 [S + 1]: its run in `order`.
    `touched`: per site, whether any adapter of these rows does anything there. `changed`: the sites at which any
    changes an input or an output; None where none does at any, so that a step of plain low rank looks no further.
    `mixes`: the rows that have several adapters, where there are some. `host_order`: `order` on the host.
    `num_single`: of the step's rows so many come first, of sequences that have one row each; None: all are such.
    """

    order: torch.Tensor
    segment_slots: torch.Tensor
    segment_starts: torch.Tensor
    touched: list[bool]
    changed: ChangedSites | None
    slots: tuple[int, ...]
    starts: tuple[int, ...]
    host_order: np.ndarray
    mixes: MixedRows | None = None
    num_single: int | None = None

    def touches(self, sites: Collection[int]) -> bool:
        """Whether any adapter of the step does anything at one of these sites; layers that none touches do nothing."""
        return any(self.touched[site] for site in sites) or (
            self.mixes is not None and any(self.mixes.touched[site] for site in sites)
        )

    def changes_input(self, site: int) -> bool:
        """Whether any adapter of the step changes what goes into the site."""
        return (self.changed is not None and self.changed.inputs[site]) or (
            self.mixes is not None and self.mixes.changed is not None and self.mixes.changed.inputs[site]
        )

    def changes_output(self, site: int) -> bool:
        """Whether any adapter of the step changes the site's output after the deltas."""
        return (self.changed is not None and self.changed.outputs[site]) or (
            self.mixes is not None and self.mixes.changed is not None and self.mixes.changed.outputs[site]
        )

    @property
    def all_slots(self) -> tuple[int, ...]:
        """Every slot that the step reads, those of mixes included."""
        if self.mixes is None:
            return self.slots
        return tuple({*self.slots, *(slot for parts in self.mixes.parts for slot, _ in parts)})


def mix_number(number: int) -> int:
    """What stands in a row's slot where it has mix `number` of its step."""
    return -2 - number


def group_rows(
    row_slots: np.ndarray,
    touches: np.ndarray,
    device: torch.device,
    *,
    inputs: np.ndarray | None = None,
    outputs: np.ndarray | None = None,
    mixes: Sequence[Parts] = (),
    num_single: int | None = None,
) -> LoraRows | None:
    """Group rows by slot, and those of mixes by mix.

    `row_slots` int32 [T], -1 for the bare base, `mix_number(i)` for `mixes[i]`; `touches`, `inputs`, `outputs` bool
    [sites, slots]: whether a slot's adapter has anything at the site, and whether it changes the input or the output
    there (none does where left out). `num_single`: see `LoraRows`. None when no row has an adapter.
    """
    mixed = _mixed(row_slots, touches, device, inputs, outputs, mixes) if mixes else None
    rows = np.flatnonzero(row_slots >= 0).astype(np.int32)
    if not rows.size and mixed is None:
        return None
    order = rows[np.argsort(row_slots[rows], kind="stable")]
    slots, starts = np.unique(row_slots[order], return_index=True)
    ends = np.append(starts, order.size).astype(np.int32)
    return LoraRows(
        order=torch.from_numpy(order).to(device),
        segment_slots=torch.from_numpy(slots.astype(np.int32)).to(device),
        segment_starts=torch.from_numpy(ends).to(device),
        touched=np.any(touches[:, slots], axis=1).tolist(),
        changed=None if inputs is None or outputs is None else _changed(inputs[:, slots], outputs[:, slots]),
        slots=tuple(slots.tolist()),
        starts=tuple(ends.tolist()),
        host_order=order,
        mixes=mixed,
        num_single=num_single,
    )


def _mixed(
    row_slots: np.ndarray,
    touches: np.ndarray,
    device: torch.device,
    inputs: np.ndarray | None,
    outputs: np.ndarray | None,
    mixes: Sequence[Parts],
) -> MixedRows | None:
    rows = np.flatnonzero(row_slots < -1).astype(np.int32)
    if not rows.size:
        return None
    order = rows[np.argsort(-row_slots[rows], kind="stable")]
    numbers, starts = np.unique(-2 - row_slots[order], return_index=True)
    found = tuple(mixes[number] for number in numbers)
    ends = np.append(starts, order.size).astype(np.int32)
    slots = np.array([slot for parts in found for slot, _ in parts], dtype=np.int32)
    return MixedRows(
        order=torch.from_numpy(order).to(device),
        row_starts=torch.from_numpy(ends).to(device),
        part_starts=torch.tensor([0, *np.cumsum([len(parts) for parts in found])], dtype=torch.int32, device=device),
        part_slots=torch.from_numpy(slots).to(device),
        part_weights=torch.tensor([w for parts in found for _, w in parts], dtype=torch.float32, device=device),
        touched=np.any(touches[:, slots], axis=1).tolist(),
        changed=None if inputs is None or outputs is None else _changed(inputs[:, slots], outputs[:, slots]),
        parts=found,
        starts=tuple(ends.tolist()),
    )


def _changed(inputs: np.ndarray, outputs: np.ndarray) -> ChangedSites | None:
    """Of the slots of a step, bool [sites, slots of the step] each."""
    if not inputs.any() and not outputs.any():
        return None
    return ChangedSites(np.any(inputs, axis=1).tolist(), np.any(outputs, axis=1).tolist())
