"""What adapters add to the rows of some tokens: a look-up at the embedding, as many products as tokens at the head.

Each row is computed by itself, so that it is the same to the last bit whatever else is in its step.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from manylora.kernels.interface import mixed_segments, segments
from manylora.kernels.rows import LoraRows
from manylora.lora.memory.device_memory import DeviceMemory

__all__ = ["add_row_logits_", "add_token_rows_", "have_token_rows"]


@dataclass(frozen=True, slots=True)
class _Owned:
    """What one adapter adds: `values` float32 [n, hidden] to the rows of tokens `ids`, ascending int64 [n].

    `mine` int64: its rows of the step. `weight`: in their mix; None of an adapter as it is. `scale` float32 [columns]:
    what it multiplies the output by in the end, or None.
    """

    mine: torch.Tensor
    ids: torch.Tensor
    values: torch.Tensor
    weight: float | None
    scale: torch.Tensor | None


def have_token_rows(rows: LoraRows, memory: DeviceMemory) -> bool:
    """Whether any adapter of a step adds to the rows of some tokens."""
    return bool(memory.with_token_rows) and not memory.with_token_rows.isdisjoint(rows.all_slots)


def _owned(site: int, rows: LoraRows, memory: DeviceMemory, *, is_mixed: bool) -> Iterator[_Owned]:
    """Of adapters as they are, or of those of mixes."""
    if not is_mixed:
        for slot, mine in segments(rows):
            found = memory.token_rows(slot, site) if slot in memory.with_token_rows else None
            if found is not None:
                yield _Owned(mine, *found, None, None)
        return
    for parts, mine in mixed_segments(rows.mixes) if rows.mixes is not None else ():
        for slot, weight in parts:
            found = memory.token_rows(slot, site) if slot in memory.with_token_rows else None
            if found is not None:
                scale, _ = memory.output(slot, site) or (None, None)
                yield _Owned(mine, *found, weight, scale)


def add_token_rows_(
    out: torch.Tensor,
    token_ids: torch.Tensor,
    site: int,
    scale: float,
    rows: LoraRows,
    memory: DeviceMemory,
    *,
    is_mixed: bool,
) -> None:
    """`out` [T, hidden] += `scale` times what is added to the rows of `token_ids` [T], in place.

    Of adapters as they are it comes before they change the output, and of mixes (`is_mixed`) after: there each part's
    change of the output is of what the base gave."""
    for each in _owned(site, rows, memory, is_mixed=is_mixed):
        asked = token_ids[each.mine]
        places = torch.searchsorted(each.ids, asked).clamp(max=len(each.ids) - 1)
        found = (each.ids[places] == asked).nonzero()[:, 0]
        if found.numel():
            delta = each.values[places[found]] * scale
            delta = delta if each.scale is None else delta * each.scale
            delta = delta if each.weight is None else delta * each.weight
            into = each.mine[found]
            out[into] = (out[into].float() + delta).to(out.dtype)


def add_row_logits_(
    out: torch.Tensor, x: torch.Tensor, site: int, rows: LoraRows, memory: DeviceMemory, *, is_mixed: bool
) -> dict[int, torch.Tensor]:
    """`out` [T, vocabulary] += the products of `x` [T, hidden] with what is added to tokens' rows; see above.

    Returns by row the logits of tokens behind the vocabulary, which are no columns of `out`: float32 [n].
    """
    own: dict[int, torch.Tensor] = {}
    for each in _owned(site, rows, memory, is_mixed=is_mixed):
        num_known = int((each.ids < out.shape[1]).sum())
        ids = each.ids[:num_known]
        for row in each.mine.tolist():
            delta = torch.mv(each.values, x[row].float())
            if num_known < len(delta):
                own[row] = delta[num_known:]
            if not num_known:
                continue
            delta = delta[:num_known]
            delta = delta if each.scale is None else delta * each.scale[ids]
            delta = delta if each.weight is None else delta * each.weight
            out[row, ids] = (out[row, ids].float() + delta).to(out.dtype)
    return own
