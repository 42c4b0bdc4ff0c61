"""What the mask that a model builds for a layer comes to, beside what our attention does: causal, within a window."""

import torch

from manylora.kernels.torch_attention import hidden_from


def window_of(mask: torch.Tensor) -> int:
    """The window, 0 for the whole past, of a mask [batch, heads, n, length] for the last n positions.

    Bool (True: may look) or what is added to the scores. Raises ValueError, with what the mask does instead, for a
    mask that is not causal within one window.
    """
    n, length = mask.shape[-2:]
    seen = mask if mask.dtype is torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if mask.dtype is not torch.bool and bool(mask.masked_select(seen).any()):
        raise ValueError("adds numbers of its own to the attention scores (a position bias or a dynamic mask)")
    visible = int(seen[0, 0, -1].sum())
    window = 0 if visible == length else visible
    if not bool((seen == ~hidden_from(n, length, window, mask.device)).all()):
        raise ValueError("masks attention in a way of its own (in chunks, blocks or by content)")
    return window
