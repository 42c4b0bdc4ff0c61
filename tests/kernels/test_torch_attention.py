"""Attention in torch operations."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from manylora.kernels.batch import AttentionOptions, Batch
from manylora.kernels.reference import attention
from manylora.kernels.torch_attention import TorchAttention

HEADS, KV_HEADS, DIM, VALUE_DIM, BLOCK = 6, 2, 8, 5, 4
SCALE = 0.3


def make_batch(sequences: list[tuple[int, int]], num_blocks: int) -> Batch:
    """Sequences of (queries, context length) in shuffled blocks."""
    counts = torch.tensor([n for n, _ in sequences])
    lens = [length for _, length in sequences]
    starts = [0, *counts.cumsum(0).tolist()]
    nothing = torch.empty(0, dtype=torch.int64)
    most = max(-(-length // BLOCK) for length in lens)
    blocks = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(sum(lens)))
    tables = blocks[: len(lens) * most].view(len(lens), most)
    ats = [torch.arange(length - n, length) for n, length in sequences]
    written = [table[at // BLOCK] * BLOCK + at % BLOCK for table, at in zip(tables, ats, strict=True)]
    return Batch(
        token_ids=nothing, positions=nothing, logit_rows=nothing,
        kv_slots=torch.cat(written),
        block_tables=tables.int(),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor(lens, dtype=torch.int32),
        num_decode=int((counts == 1).sum()), starts=tuple(starts), lens=tuple(lens),
    )  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"softcap": 2.0},
        {"chunk": 4},
        {"sinks": torch.linspace(-3, 3, HEADS)},
        {"slopes": torch.linspace(-0.1, 0.5, HEADS)},
    ],
    ids=str,
)
@pytest.mark.parametrize("multiplies", [True, False])
def test_two_steps_of_layers_with_and_without_a_window(kind: dict[str, Any], multiplies: bool) -> None:
    """One object serves all layers and steps; what is behind a sequence's end is NaN."""
    random = torch.Generator().manual_seed(0)
    attend = TorchAttention(lambda _dtype: multiplies)
    for sequences in ([(1, 5), (1, 13), (3, 3), (4, 11)], [(1, 6), (1, 14), (1, 4), (1, 12)], [(2, 9)]):
        batch = make_batch(sequences, num_blocks=40)
        q = torch.randn(batch.starts[-1], HEADS, DIM, generator=random)
        keys, values = (torch.full((40, KV_HEADS, BLOCK, size), float("nan")) for size in (DIM, VALUE_DIM))
        contexts = []
        for length in batch.lens:
            k, v = (torch.randn(length, KV_HEADS, size, generator=random) for size in (DIM, VALUE_DIM))
            contexts.append((k, v))
        counts = [end - start for start, end in pairwise(batch.starts)]
        for table, n, (k, v) in zip(batch.block_tables.long(), counts, contexts, strict=True):
            at = torch.arange(len(k) - n)  # what earlier steps wrote
            keys[table[at // BLOCK], :, at % BLOCK] = k[: len(at)]
            values[table[at // BLOCK], :, at % BLOCK] = v[: len(at)]
        new_k, new_v = (torch.cat([c[i][-n:] for c, n in zip(contexts, counts, strict=True)]) for i in (0, 1))
        for window in (0, 4, 0):
            options = AttentionOptions(**{"scale": SCALE, "window": window, "softcap": 0.0, **kind})
            actual = attend(q, new_k, new_v, keys, values, batch, options)
            for s, (k, v) in enumerate(contexts):
                mine = slice(batch.starts[s], batch.starts[s + 1])
                torch.testing.assert_close(actual[mine], attention(q[mine], k, v, options).float())
