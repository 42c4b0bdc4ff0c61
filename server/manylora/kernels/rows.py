"""Which rows of a step belong to which adapter, worked out once per step and used by every layer."""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class ChangedSites:
    """Per site, whether any adapter of a step changes what goes into it, and what comes out after the deltas."""

    inputs: list[bool]
    outputs: list[bool]


@dataclass(frozen=True, slots=True)
class LoraRows:
    """Rows grouped by slot.

    `order` int32 [R]: the rows that have an adapter, sorted by slot, in their own order within one.
    `segment_slots` int32 [S]: each segment's slot. `segment_starts` int32 [S + 1]: its run in `order`.
    `touched`: per site, whether any adapter of this step does anything there; layers that none touches do nothing.
    `changed`: the sites at which any changes an input or an output; None where none does at any, so that a step of
    plain low rank looks no further.
    """

    order: torch.Tensor
    segment_slots: torch.Tensor
    segment_starts: torch.Tensor
    touched: list[bool]
    changed: ChangedSites | None
    slots: tuple[int, ...]
    starts: tuple[int, ...]


def group_rows(
    row_slots: np.ndarray,
    touches: np.ndarray,
    device: torch.device,
    *,
    inputs: np.ndarray | None = None,
    outputs: np.ndarray | None = None,
) -> LoraRows | None:
    """Group rows by slot.

    `row_slots` int32 [T], -1 for the bare base; `touches`, `inputs`, `outputs` bool [sites, slots]: whether a slot's
    adapter has anything at the site, and whether it changes the input or the output there (none does where left out).
    None when no row has an adapter.
    """
    rows = np.flatnonzero(row_slots >= 0).astype(np.int32)
    if not rows.size:
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
    )


def _changed(inputs: np.ndarray, outputs: np.ndarray) -> ChangedSites | None:
    """Of the slots of a step, bool [sites, slots of the step] each."""
    if not inputs.any() and not outputs.any():
        return None
    return ChangedSites(np.any(inputs, axis=1).tolist(), np.any(outputs, axis=1).tolist())
