"""Paged attention in torch operations: the fallback that runs anywhere.

The sequences with one query each are one padded batch; a prompt's chunk is done on its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from manylora.kernels.batch import AttentionOptions, Batch
from manylora.kernels.kv_entries import as_entries, read_entries, width_of

__all__ = ["TorchAttention", "hidden_from", "prefill"]


@dataclass(frozen=True, slots=True)
class _DecodeView:
    """Which of the cache's rows [blocks * KVH] the decoding sequences [n] look at.

    `entries` int64 [n * KVH * blocks of the longest]; `hidden` bool [n, 1, 1, L]: positions they may not see;
    `unseen` int64: the same as rows of [n * KVH * L]; `ahead` int64 [n, 1, 1, 1, L]: how far each lies from the last.
    """

    entries: torch.Tensor
    hidden: torch.Tensor
    unseen: torch.Tensor
    ahead: torch.Tensor


class TorchAttention:
    """`Attention` of torch operations.

    `multiplies`: whether torch multiplies matrices of a type here by instructions of its own. Of other types keys and
    values are widened once they are gathered, as small matmuls are slow then.
    """

    def __init__(self, multiplies: Callable[[torch.dtype], bool]) -> None:
        self._multiplies = multiplies
        # Where a step reads and writes the cache, worked out once for all layers of the same shape.
        self._step: torch.Tensor | None = None
        self._views: dict[tuple[int, int, int], _DecodeView] = {}
        self._written: dict[int, torch.Tensor] = {}

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        batch: Batch,
        options: AttentionOptions,
    ) -> torch.Tensor:
        if self._step is not batch.context_lens:  # every step has its own
            self._step, self._views, self._written = batch.context_lens, {}, {}
        self._write(k, v, keys, values, batch)
        out = q.new_empty((*q.shape[:2], width_of(values)))
        n = batch.num_decode
        if n:
            view = self._view(batch, keys.shape[1], keys.shape[2], options)
            out[:n] = _decode(q[:n], keys, values, view, options, is_direct=self._multiplies(q.dtype))
        for s in range(n, len(batch.lens)):
            rows, length = slice(batch.starts[s], batch.starts[s + 1]), batch.lens[s]
            # The whole of it: nothing to be brought together from blocks, unless it was rounded there.
            if rows.stop - rows.start == length and keys.is_floating_point():
                past = k[rows].transpose(0, 1), v[rows].transpose(0, 1)
            else:
                table = batch.block_tables[s, : -(-length // keys.shape[2])].long()
                past = (_flat(keys, table, length).to(q.dtype), _flat(values, table, length).to(q.dtype))
            out[rows] = prefill(q[rows], *past, options)
        return out

    def _write(self, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch) -> None:
        """Store the step's k, v [T, KVH, their width] in the cache."""
        num_kv, block_size = keys.shape[1:3]
        if num_kv not in self._written:  # rows of the cache as [blocks * KVH * block size, D], int64 [T * KVH]
            block, offset = batch.kv_slots // block_size, batch.kv_slots % block_size
            heads = torch.arange(num_kv, device=block.device)
            self._written[num_kv] = ((block[:, None] * num_kv + heads) * block_size + offset[:, None]).flatten()
        for new, cache in ((k, keys), (v, values)):
            flat = cache.view(-1, cache.shape[3])
            flat.index_copy_(0, self._written[num_kv], as_entries(new.reshape(-1, new.shape[2]), cache))

    def _view(self, batch: Batch, num_kv: int, block_size: int, options: AttentionOptions) -> _DecodeView:
        """What the decoding sequences look at, in layers with as many heads and the same window or chunk."""
        seen = num_kv, options.window, options.chunk
        if seen not in self._views:
            self._views[seen] = _decode_view(batch, block_size, *seen)
        return self._views[seen]


def hidden_from(n: int, length: int, window: int, device: torch.device, chunk: int = 0) -> torch.Tensor:
    """Which of `length` positions each of the last `n` may not look at: bool [n, length]. Window 0: the whole past."""
    at = torch.arange(length - n, length, device=device)[:, None]
    position = torch.arange(length, device=device)
    hidden = position > at
    if window:
        hidden |= position <= at - window
    if chunk:
        hidden |= position < at // chunk * chunk
    return hidden


def _decode_view(batch: Batch, block_size: int, num_kv: int, window: int, chunk: int) -> _DecodeView:
    n = batch.num_decode
    blocks = -(-max(batch.lens[:n]) // block_size)
    tables, lens = batch.block_tables[:n, :blocks].long(), batch.context_lens[:n, None]
    position = torch.arange(blocks * block_size, device=lens.device)
    hidden = position >= lens
    if window:
        hidden |= position < lens - window
    if chunk:
        hidden |= position < (lens - 1) // chunk * chunk
    heads = torch.arange(num_kv, device=lens.device)[:, None]
    entries = tables[:, None] * num_kv + heads
    sequence, at = hidden.nonzero(as_tuple=True)
    unseen = (sequence * num_kv + heads) * position.numel() + at
    ahead = (position - (lens - 1))[:, None, None, None]
    return _DecodeView(entries.flatten(), hidden[:, None, None], unseen.flatten(), ahead)


def _flat(cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """The first positions of one sequence's blocks, [KVH, length, D]."""
    return read_entries(cache[table].transpose(0, 1).flatten(1, 2)[:, :length])


def _softmax(
    scores: torch.Tensor, hidden: torch.Tensor, ahead: torch.Tensor, options: AttentionOptions
) -> torch.Tensor:
    """Weights of scores [..., KVH, group, n, L]. `ahead`: how much farther on each key is than its query."""
    num_kv, group = scores.shape[-4:-2]
    scores = scores.float() * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.slopes is not None:
        scores = scores + ahead * options.slopes.view(num_kv, group, 1, 1)
    scores = scores.masked_fill(hidden, float("-inf"))
    if options.sinks is None:
        return torch.softmax(scores, dim=-1)
    sinks = options.sinks.view(num_kv, group, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat((scores, sinks), dim=-1), dim=-1)[..., :-1]


def _decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    view: _DecodeView,
    options: AttentionOptions,
    *,
    is_direct: bool,
) -> torch.Tensor:
    n, heads, dim = q.shape
    num_kv = keys.shape[1]
    wide = q.dtype if is_direct else torch.float32

    def gather(cache: torch.Tensor) -> torch.Tensor:
        """[n, KVH, L, D], a copy. Behind a sequence's end blocks hold what others left there, and 0 * NaN is NaN."""
        rows = cache.flatten(2).flatten(0, 1).index_select(0, view.entries)
        found = read_entries(rows.view(-1, cache.shape[3])).to(wide)
        return found.index_fill_(0, view.unseen, 0).view(n, num_kv, -1, found.shape[1])

    k, v = gather(keys), gather(values)
    grouped = q.reshape(n, num_kv, -1, dim).to(wide)
    if is_direct and options.is_plain:
        out = functional.scaled_dot_product_attention(grouped, k, v, attn_mask=~view.hidden, scale=options.scale)
    else:
        scores = (grouped @ k.transpose(2, 3))[:, :, :, None]
        out = _softmax(scores, view.hidden[:, None], view.ahead, options)[:, :, :, 0].to(wide) @ v
    return out.reshape(n, heads, -1).to(q.dtype)


def prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    """q [n, H, D] at the end of k [KVH, L, D], v [KVH, L, their width]."""
    n, heads, dim = q.shape
    num_kv, length, _ = k.shape
    causal = n == length and not options.window and not options.chunk
    hidden = None if causal and options.is_plain else hidden_from(n, length, options.window, q.device, options.chunk)
    if options.is_plain:
        mask = None if hidden is None else ~hidden  # of a whole prompt torch skips what a mask would hide
        out = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k[None], v[None], mask, is_causal=causal, scale=options.scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)
    grouped = q.transpose(0, 1).reshape(num_kv, -1, dim)  # rows: head within the group, then query
    assert hidden is not None
    position = torch.arange(length, device=q.device)
    ahead = position - position[length - n :, None]
    weights = _softmax((grouped @ k.transpose(1, 2)).view(num_kv, -1, n, length), hidden, ahead, options)
    out = (weights.to(v.dtype).flatten(1, 2) @ v).view(heads, n, -1)
    return out.transpose(0, 1)
