"""Paged attention on a GPU: two or three launches for a layer, whatever sequences a step holds."""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import triton

from manylora.kernels.batch import AttentionOptions, Batch
from manylora.kernels.programs import attention as programs
from manylora.kernels.triton_lora import is_interpreted

__all__ = ["TritonAttention"]

_ROWS: Final = 64  # queries times heads of one key head that a program of a prompt has
_LEAST_ROWS: Final = 16  # what a matrix instruction takes
_PARTS: Final = 16  # that a long sequence's keys are cut into, where it has one query
_LEAST_KEYS: Final = 256  # of a part
_NARROW_ROW: Final = 128  # bytes of a head
_WIDE_ROW: Final = 256


@dataclass(frozen=True, slots=True)
class _Items:
    """Programs of a step, int32 [n, 2] each: of sequences with one query, and of all others."""

    single: torch.Tensor | None
    many: torch.Tensor | None


class TritonAttention:
    """`Attention` in Triton. Keeps what the layers of a step share."""

    def __init__(self) -> None:
        self._step: torch.Tensor | None = None
        self._items: dict[int, _Items] = {}

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
        """See `Attention`."""
        if len(k):
            size, widths = keys.shape[2], (keys.shape[3], values.shape[3])
            programs.write_kv[k.shape[0], k.shape[1]](
                k, v, keys, values, batch.kv_slots, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
                keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
                BLOCK=size, D=widths[0], E=widths[1], DP=_power(widths[0]), EP=_power(widths[1]), num_warps=1,
            )  # fmt: skip
        return self.attend(q, keys, values, batch, options)

    def attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, options: AttentionOptions
    ) -> torch.Tensor:
        """q [T, heads, keys' width] -> [T, heads, values' width], where the step's keys and values are in the cache."""
        if self._step is not batch.context_lens:  # every step has its own
            self._step, self._items = batch.context_lens, {}
        padded = triton.next_power_of_2(q.shape[1] // keys.shape[1])
        queries = max(1, _ROWS // padded)
        if queries not in self._items:
            self._items[queries] = _items(batch, queries)
        items = self._items[queries]
        out = torch.empty((*q.shape[:2], values.shape[3]), dtype=q.dtype, device=q.device)
        if items.single is not None:
            most = min(_PARTS, triton.cdiv(max(batch.lens[: batch.num_decode]), _LEAST_KEYS))
            rows = batch.num_decode  # they come first, and prompts behind them have no parts
            parts = torch.empty((most, rows, *out.shape[1:]), dtype=torch.float32, device=q.device)
            weights = torch.empty((most, rows, q.shape[1], 2), dtype=torch.float32, device=q.device)
            size = _launch(parts, weights, q, keys, values, batch, options, items.single, 1, most)
            programs.combine[len(items.single), q.shape[1]](
                out, parts, weights, items.single, batch.query_starts, batch.context_lens, options.sinks, rows,
                q.shape[1], options.window, options.chunk, E=values.shape[3], EP=_power(values.shape[3]), BN=size,
                SPLITS=_PARTS, LEAST=_LEAST_KEYS, HAS_SINKS=options.sinks is not None, num_warps=4,
            )  # fmt: skip
        if items.many is not None:
            _launch(out, None, q, keys, values, batch, options, items.many, queries, None)
        return out


def _launch(
    out: torch.Tensor,
    weights: torch.Tensor | None,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: Batch,
    options: AttentionOptions,
    items: torch.Tensor,
    queries: int,
    num_parts: int | None,
) -> int:
    """Launch `attend`; returns how many keys a program takes at a time.

    `num_parts`: that any sequence's keys are cut into; None where none are. `out` [T, heads, values' width], or of
    parts [num_parts, rows, heads, values' width], of the step's first rows.
    """
    heads, num_kv = q.shape[1], keys.shape[1]
    width, value_width = _power(keys.shape[3]), _power(values.shape[3])
    padded = triton.next_power_of_2(heads // num_kv)
    size = _keys_at_once(max(width, value_width) * q.itemsize, is_prompt=num_parts is None)
    programs.attend[len(items), num_kv, num_parts or 1](
        out, weights, q, keys, values, batch.block_tables, items, batch.query_starts, batch.context_lens,
        options.sinks, options.slopes, out.shape[-3], heads, heads // num_kv, q.stride(0), q.stride(1),
        batch.block_tables.stride(0), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        options.scale, options.window, options.softcap, options.chunk,
        BLOCK=keys.shape[2], D=keys.shape[3], E=values.shape[3], DP=width, EP=value_width, GP=padded, BQ=queries,
        BM=max(_LEAST_ROWS, queries * padded), BN=size, SPLITS=1 if num_parts is None else _PARTS, LEAST=_LEAST_KEYS,
        HAS_CAP=options.softcap > 0, HAS_SINKS=options.sinks is not None, HAS_SLOPES=options.slopes is not None,
        WIDE=is_interpreted() or q.itemsize > 2, num_warps=8 if num_parts is None else 4, num_stages=2,
    )  # fmt: skip
    return size


def _keys_at_once(row_bytes: int, *, is_prompt: bool) -> int:
    """As many as registers and shared memory of every card have room for beside a program's queries."""
    if row_bytes > _WIDE_ROW:
        return 32
    return 128 if is_prompt and row_bytes <= _NARROW_ROW else 64


def _items(batch: Batch, queries: int) -> _Items:
    """Programs of sequences with one query; and of at most `queries` queries each, of the others."""
    n = batch.num_decode
    single = np.stack((np.arange(n), np.zeros(n, dtype=np.int64)), axis=1)
    counts = np.diff(batch.starts)[n:]
    pieces = -(-counts // queries)
    owner = np.repeat(np.arange(len(counts)), pieces)
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    many = np.stack((owner + n, number * queries), axis=1)
    device = batch.context_lens.device
    found = (torch.from_numpy(each.astype(np.int32)).to(device) if len(each) else None for each in (single, many))
    return _Items(*found)


def _power(width: int) -> int:
    """The power of two that a row of `width` numbers is read in: matrix instructions take 16 at least."""
    return max(16, int(triton.next_power_of_2(width)))
