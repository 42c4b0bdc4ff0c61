"""What the mask that a model builds for a layer comes to: causal attention, within a window or within chunks."""

from dataclasses import dataclass

import torch

from manylora.kernels.torch_attention import hidden_from

__all__ = ["Reach", "reach_of"]


@dataclass(frozen=True, slots=True)
class Reach:
    """How far back a position sees: `window` positions, or to its `chunk`'s beginning; 0 and 0 for the whole past."""

    window: int = 0
    chunk: int = 0


def reach_of(mask: torch.Tensor, chunk: int = 0) -> Reach:
    """The reach of a mask [batch, heads, n, length] for the last n positions. `chunk`: the size that chunks would have.

    Bool (True: may look) or what is added to the scores. Raises ValueError, with what the mask does instead, for a
    mask that is not causal within one window or within chunks.
    """
    n, length = mask.shape[-2:]
    seen = mask if mask.dtype is torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if mask.dtype is not torch.bool and bool(mask.masked_select(seen).any()):
        raise ValueError("adds numbers of its own to the attention scores (a position bias or a dynamic mask)")
    visible = int(seen[0, 0, -1].sum())
    candidates = [Reach(window=0 if visible == length else visible)]
    if 0 < chunk < length:
        candidates.append(Reach(chunk=chunk))
    for reach in candidates:
        if bool((seen == ~hidden_from(n, length, reach.window, mask.device, reach.chunk)).all()):
            return reach
    raise ValueError("masks attention in a way of its own (in blocks or by content)")
