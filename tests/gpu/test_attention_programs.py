"""Paged attention's programs in the interpreter, against the specification in kernels/reference.py."""

from dataclasses import dataclass, replace

import pytest
import torch

from manylora.kernels.batch import AttentionOptions, Batch
from manylora.kernels.reference import attention, write_kv
from manylora.kernels.triton_attention import TritonAttention
from tests.kernels.made import Made
from tests.kernels.tolerance import TOLERANCES, assert_close, assert_same_bits

pytestmark = pytest.mark.interpreted
by_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
CASES = [(1, 1), (1, 50), (9, 20), (30, 30), (1, 270)]
PLAIN = AttentionOptions(0.2, 0, 0.0)


@dataclass
class Case:
    """Sequences as (queries, context length), the single queries first, over a cache that is NaN everywhere else."""

    dtype: torch.dtype
    sequences: list[tuple[int, int]]
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    value_dim: int = 32
    options: AttentionOptions = PLAIN
    block_size: int = 16

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(1)
        self.sequences = sorted(self.sequences, key=lambda each: each[0] > 1)

        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=g).to(self.dtype)

        self.q = [drawn(n, self.heads, self.head_dim) for n, _ in self.sequences]
        self.keys = [drawn(length, self.kv_heads, self.head_dim) for _, length in self.sequences]
        self.values = [drawn(length, self.kv_heads, self.value_dim) for _, length in self.sequences]

    def run(self, chosen: list[int] | None = None) -> list[torch.Tensor]:
        """The result of each of the chosen sequences, all of them if it is not said."""
        chosen = list(range(len(self.sequences))) if chosen is None else chosen
        size, sequences = self.block_size, [self.sequences[s] for s in chosen]
        used = [-(-length // size) for _, length in sequences]
        order = torch.randperm(sum(used) + 3, generator=torch.Generator().manual_seed(2)).int()
        tables = torch.full((len(used), max(used) + 2), -1, dtype=torch.int32)
        shape = (sum(used) + 3, self.kv_heads, size)
        keys = torch.full((*shape, self.head_dim), float("nan"), dtype=self.dtype)
        values = torch.full((*shape, self.value_dim), float("nan"), dtype=self.dtype)
        new: list[list[torch.Tensor]] = [[], []]
        slots: list[torch.Tensor] = []
        taken = 0
        for i, s in enumerate(chosen):
            n, length = self.sequences[s]
            tables[i, : used[i]] = order[taken : taken + used[i]]
            taken += used[i]
            at = torch.arange(length)
            places = tables[i][at // size].long() * size + at % size
            old = length - n
            write_kv(self.keys[s][:old], self.values[s][:old], keys, values, places[:old].tolist())
            new[0].append(self.keys[s][old:])
            new[1].append(self.values[s][old:])
            slots.append(places[old:])
        counts = [n for n, _ in sequences]
        starts = [0, *torch.tensor(counts).cumsum(0).tolist()]
        lens = [length for _, length in sequences]
        batch = Batch(
            token_ids=torch.zeros(starts[-1], dtype=torch.int64), positions=torch.zeros(starts[-1], dtype=torch.int64),
            kv_slots=torch.cat(slots), block_tables=tables, query_starts=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor(lens, dtype=torch.int32), num_decode=sum(n == 1 for n in counts),
            starts=tuple(starts), lens=tuple(lens), logit_rows=torch.zeros(0, dtype=torch.int64),
        )  # fmt: skip
        k, v = (torch.cat(each) for each in new)
        # As a model has it after the rotary embedding: one head after the other.
        q = torch.cat([self.q[s] for s in chosen]).transpose(0, 1).contiguous().transpose(0, 1)
        out = TritonAttention()(q, k, v, keys, values, batch, self.options)
        return list(torch.split(out, counts))

    def expected(self) -> list[torch.Tensor]:
        return [attention(*each, self.options) for each in zip(self.q, self.keys, self.values, strict=True)]

    def check(self) -> None:
        for actual, wanted in zip(self.run(), self.expected(), strict=True):
            assert_close(actual, wanted)


@by_dtype
@pytest.mark.parametrize(("head_dim", "value_dim"), [(1, 1), (33, 7), (64, 64), (80, 96), (256, 128)])
def test_every_width_is_right(dtype: torch.dtype, head_dim: int, value_dim: int) -> None:
    options = AttentionOptions(head_dim**-0.5, 0, 0.0)
    Case(dtype, CASES, head_dim=head_dim, value_dim=value_dim, options=options).check()


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (9, 3), (16, 1)])
def test_every_grouping_of_heads_is_right(heads: int, kv_heads: int) -> None:
    Case(torch.float32, CASES, heads=heads, kv_heads=kv_heads).check()


@pytest.mark.parametrize("window", [1, 64, 1000])
@pytest.mark.parametrize("sequences", [CASES, [(1, 700), (70, 130)]], ids=["short", "long"])
def test_windows_are_right(window: int, sequences: list[tuple[int, int]]) -> None:
    Case(torch.float32, sequences, options=AttentionOptions(0.2, window, 0.0)).check()


@by_dtype
def test_caps_chunks_sinks_and_slopes_are_right(dtype: torch.dtype) -> None:
    sinks, slopes = torch.linspace(-2, 3, 6), torch.linspace(0.01, 0.3, 6)
    for options in (
        AttentionOptions(0.2, 0, 3.0),
        AttentionOptions(0.2, 0, 0.0, chunk=24),
        AttentionOptions(0.2, 40, 0.0, sinks=sinks),
        AttentionOptions(0.2, 0, 5.0, slopes=slopes),
    ):
        Case(dtype, CASES, options=options).check()


def test_a_long_sequence_is_cut_into_parts() -> None:
    Case(torch.float32, [(1, 4500), (1, 257), (1, 256)], heads=2, kv_heads=1, head_dim=16, value_dim=16).check()


def test_parts_take_the_room_of_the_sequences_that_have_them() -> None:
    """However many rows of prompts there are beside them."""
    case = Case(torch.float32, [(1, 600), (1, 20), (200, 230)], heads=2, kv_heads=1, head_dim=16, value_dim=16)
    with Made() as made:
        found = case.run()
    parts = [each.shape for each in made.found if each.operation == "empty" and len(each.shape) == 4]
    assert parts == [(3, 2, 2, 16), (3, 2, 2, 2)]
    for actual, wanted in zip(found, case.expected(), strict=True):
        assert_close(actual, wanted)


@by_dtype
def test_a_sequence_is_the_same_to_the_last_bit_alone(dtype: torch.dtype) -> None:
    case = Case(dtype, [*CASES, (1, 600)], options=AttentionOptions(0.2, 100, 0.0))
    together = case.run()
    for s in range(len(together)):
        assert_same_bits(case.run([s])[0], together[s])


def test_blocks_of_any_size_are_read() -> None:
    case = Case(torch.float32, [(1, 50), (9, 20)])
    for size in (1, 5):
        replace(case, block_size=size).check()
