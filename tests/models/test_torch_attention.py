"""Attention in torch operations, against its definition."""

from itertools import pairwise

import pytest
import torch

from manylora.kernels.batch import Batch
from manylora.models.attention import AttentionOptions, StepViews, attend_paged

HEADS, KV_HEADS, DIM, BLOCK = 6, 2, 8, 4
SCALE = 0.3


def make_batch(sequences: list[tuple[int, int]], num_blocks: int) -> Batch:
    """Sequences of (queries, context length) in shuffled blocks; attention reads no other field than these."""
    counts = torch.tensor([n for n, _ in sequences])
    lens = [length for _, length in sequences]
    starts = [0, *counts.cumsum(0).tolist()]
    nothing = torch.empty(0, dtype=torch.int64)
    most = max(-(-length // BLOCK) for length in lens)
    tables = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(sum(lens)))
    return Batch(
        token_ids=nothing, positions=nothing, kv_slots=nothing, logit_rows=nothing,
        block_tables=tables[: len(lens) * most].view(len(lens), most).int(),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor(lens, dtype=torch.int32),
        num_decode=int((counts == 1).sum()), starts=tuple(starts), lens=tuple(lens),
    )  # fmt: skip


def definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, softcap: float) -> torch.Tensor:
    """q [n, H, D] at the end of k, v [L, KVH, D], in float64."""
    n, length = len(q), len(k)
    wide_k, wide_v = (t.double().repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q.double(), wide_k) * SCALE
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    i, j = torch.arange(length - n, length)[:, None], torch.arange(length)
    hidden = (j > i) | (i - j >= window) if window else j > i
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, float("-inf")).softmax(-1), wide_v)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_two_steps_of_layers_with_and_without_a_window(softcap: float) -> None:
    """The same view object serves all layers and steps, as in a server; what is behind a sequence's end is NaN."""
    random = torch.Generator().manual_seed(0)
    views = StepViews()
    for sequences in ([(1, 5), (1, 13), (3, 3), (4, 11)], [(1, 6), (1, 14), (1, 4), (1, 12)], [(2, 9)]):
        batch = make_batch(sequences, num_blocks=40)
        q = torch.randn(batch.starts[-1], HEADS, DIM, generator=random)
        keys, values = (torch.full((40, KV_HEADS, BLOCK, DIM), float("nan")) for _ in "kv")
        contexts = []
        for table, length in zip(batch.block_tables.long(), batch.lens, strict=True):
            k, v = (torch.randn(length, KV_HEADS, DIM, generator=random) for _ in "kv")
            at = torch.arange(length)
            keys[table[at // BLOCK], :, at % BLOCK] = k
            values[table[at // BLOCK], :, at % BLOCK] = v
            contexts.append((k, v))
        counts = [end - start for start, end in pairwise(batch.starts)]
        new_k, new_v = (torch.cat([c[i][-n:] for c, n in zip(contexts, counts, strict=True)]) for i in (0, 1))
        for window in (0, 4, 0):
            actual = attend_paged(q, new_k, new_v, keys, values, batch, AttentionOptions(SCALE, window, softcap), views)
            for s, (k, v) in enumerate(contexts):
                mine = slice(batch.starts[s], batch.starts[s + 1])
                torch.testing.assert_close(actual[mine], definition(q[mine], k, v, window, softcap).float())
