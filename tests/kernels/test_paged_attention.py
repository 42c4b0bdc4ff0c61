from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from manylora.kernels import native
from manylora.kernels.batch import AttentionOptions
from manylora.kernels.kv_entries import as_entries, entry_width, read_entries
from manylora.kernels.reference import attention
from tests.kernels.tolerance import assert_close, assert_same_bits


@dataclass
class AttentionCase:
    """Sequences as (queries, context length), their keys scattered over a cache that is NaN everywhere else."""

    dtype: torch.dtype
    sequences: list[tuple[int, int]]
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    scale: float = 0.125
    window: int = 0
    softcap: float = 0.0
    value_dim: int = 0  # the keys', unless told
    chunk: int = 0
    sinks: torch.Tensor | None = None
    slopes: torch.Tensor | None = None
    is_rounded: bool = False  # the cache: then what is attended to is what can be read back from it
    q: torch.Tensor = field(init=False)
    keys: list[torch.Tensor] = field(init=False)
    values: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(1)
        total = sum(n for n, _ in self.sequences)
        self.q = torch.randn(total, self.heads, self.head_dim, generator=g).to(self.dtype)
        self.value_dim = self.value_dim or self.head_dim
        shapes = [(length, self.kv_heads) for _, length in self.sequences]
        self.keys = [torch.randn((*shape, self.head_dim), generator=g).to(self.dtype) for shape in shapes]
        self.values = [torch.randn((*shape, self.value_dim), generator=g).to(self.dtype) for shape in shapes]

    def run(self) -> torch.Tensor:
        used = [-(-length // self.block_size) for _, length in self.sequences]
        num_blocks = sum(used) + 3
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(2)).int()
        tables = torch.full((len(used), max(used) + 2), -1, dtype=torch.int32)
        shape = (num_blocks, self.kv_heads, self.block_size)
        kept_as, nothing = (torch.int8, -1) if self.is_rounded else (self.dtype, float("nan"))  # as a scale: NaN too
        k_cache, v_cache = (
            torch.full((*shape, entry_width(width, kept_as)), nothing, dtype=kept_as)
            for width in (self.head_dim, self.value_dim)
        )
        taken = 0
        for s, count in enumerate(used):
            tables[s, :count] = order[taken : taken + count]
            taken += count
            at = torch.arange(self.sequences[s][1])
            blocks = tables[s][at // self.block_size].long()
            k_cache[blocks, :, at % self.block_size] = as_entries(self.keys[s], k_cache)
            v_cache[blocks, :, at % self.block_size] = as_entries(self.values[s], v_cache)
        counts = torch.tensor([0] + [n for n, _ in self.sequences])
        lens = torch.tensor([length for _, length in self.sequences], dtype=torch.int32)
        out = torch.full((*self.q.shape[:2], self.value_dim), float("nan"), dtype=self.dtype)
        native.paged_attention(
            out, self.q, k_cache, v_cache, tables, counts.cumsum(0).int(), lens, self.scale, self.window, self.softcap,
            self.chunk, self.sinks, self.slopes,
        )  # fmt: skip
        return out

    def expected(self) -> torch.Tensor:
        """The specification, one sequence after the other."""
        queries = torch.split(self.q, [n for n, _ in self.sequences])
        options = AttentionOptions(self.scale, self.window, self.softcap, self.chunk, self.sinks, self.slopes)
        keys, values = self.keys, self.values
        if self.is_rounded:
            room = torch.empty(0, dtype=torch.int8)
            keys, values = ([read_entries(as_entries(each, room)) for each in kept] for kept in (keys, values))
        return torch.cat([attention(*each, options) for each in zip(queries, keys, values, strict=True)])


@pytest.mark.parametrize("head_dim", [1, 7, 33, 64, 80, 96, 128, 256])
def test_every_head_dim_is_right(cpu_path: str, dtype: torch.dtype, head_dim: int) -> None:
    case = AttentionCase(dtype, [(1, 1), (1, 50), (9, 20), (30, 30)], head_dim=head_dim, scale=head_dim**-0.5)
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (9, 3), (8, 2), (14, 2), (71, 1), (10, 2)])
def test_every_grouping_of_heads_is_right(cpu_path: str, dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    case = AttentionCase(dtype, [(1, 70), (5, 130), (1, 3)], heads=heads, kv_heads=kv_heads)
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 200, 1024, 1025, 3000])
def test_one_token_attends_to_contexts_of_any_length(cpu_path: str, dtype: torch.dtype, length: int) -> None:
    case = AttentionCase(dtype, [(1, length)])
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize(("queries", "length"), [(2, 2), (64, 64), (100, 300), (3, 2500), (257, 257)])
def test_chunks_of_a_prompt_see_what_came_before_and_nothing_after(
    cpu_path: str, dtype: torch.dtype, queries: int, length: int
) -> None:
    case = AttentionCase(dtype, [(queries, length), (1, 40)])
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize("window", [1, 5, 64, 100, 4000])
def test_a_sliding_window_hides_what_is_older(cpu_path: str, dtype: torch.dtype, window: int) -> None:
    case = AttentionCase(dtype, [(1, 90), (70, 200), (1, 2100), (1, 2)], window=window)
    assert_close(case.run(), case.expected())


def test_scores_far_below_zero_in_a_window_do_not_vanish(cpu_path: str, dtype: torch.dtype) -> None:
    case = AttentionCase(dtype, [(80, 200)], window=70)
    case.q = case.q.abs()
    case.keys[0] -= 25
    case.values[0].fill_(1)
    assert_close(case.run(), torch.ones_like(case.q))


def test_scores_are_capped(cpu_path: str, dtype: torch.dtype) -> None:
    case = AttentionCase(dtype, [(1, 90), (20, 50)], softcap=3.0, scale=1.0)
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize(("head_dim", "value_dim"), [(24, 16), (192, 128), (16, 80), (7, 33)])
def test_values_may_have_another_width_than_keys(
    cpu_path: str, dtype: torch.dtype, head_dim: int, value_dim: int
) -> None:
    case = AttentionCase(dtype, [(1, 1), (9, 20), (1, 2100)], head_dim=head_dim, value_dim=value_dim)
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize(("chunk", "window"), [(1, 0), (5, 3), (64, 0), (1000, 100)])
def test_chunks_hide_what_lies_before_them(cpu_path: str, dtype: torch.dtype, chunk: int, window: int) -> None:
    case = AttentionCase(dtype, [(1, 90), (70, 200), (1, 2100), (1, 64), (1, 65)], chunk=chunk, window=window)
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize("window", [0, 20])
def test_sinks_take_their_share_of_every_row(cpu_path: str, dtype: torch.dtype, window: int) -> None:
    sinks = torch.tensor([-30.0, -1.0, 0.0, 2.0, 6.0, 90.0])
    case = AttentionCase(dtype, [(1, 1), (70, 200), (1, 2100)], sinks=sinks, window=window)
    assert_close(case.run(), case.expected())


def test_scores_fall_with_the_distance(cpu_path: str, dtype: torch.dtype) -> None:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0, 0.01, -0.001])
    case = AttentionCase(dtype, [(1, 1), (70, 200), (1, 2100), (5, 64)], slopes=slopes)
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize("block_size", [1, 3, 16, 32, 128])
def test_blocks_may_have_any_size(cpu_path: str, dtype: torch.dtype, block_size: int) -> None:
    case = AttentionCase(dtype, [(1, 77), (6, 131)], block_size=block_size)
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize("kind", [{}, {"sinks": torch.arange(6.0), "slopes": torch.full((6,), 0.1), "value_dim": 40}])
def test_a_sequences_result_does_not_depend_on_its_neighbours(
    cpu_path: str, dtype: torch.dtype, kind: dict[str, Any]
) -> None:
    lengths = [5, 70, 1030, 2100]
    together = AttentionCase(dtype, [(1, length) for length in lengths] * 4, **kind)
    result = together.run()
    for s, length in enumerate(lengths):
        alone = AttentionCase(dtype, [(1, length)], **kind)
        alone.q, alone.keys, alone.values = together.q[s : s + 1], [together.keys[s]], [together.values[s]]
        assert_same_bits(alone.run(), result[s : s + 1])


def test_a_sequence_with_nan_keys_leaves_its_neighbours_alone(cpu_path: str, dtype: torch.dtype) -> None:
    case = AttentionCase(dtype, [(1, 30), (4, 30), (1, 90)])
    clean = case.run()
    case.keys[1].fill_(float("nan"))
    actual = case.run()
    assert actual[1:5].isnan().all()
    assert_same_bits(actual[:1], clean[:1])
    assert_same_bits(actual[5:], clean[5:])


def test_queries_may_be_a_slice_of_a_fused_row(cpu_path: str, dtype: torch.dtype) -> None:
    case = AttentionCase(dtype, [(1, 30), (4, 30)])
    expected = case.expected()
    wide = torch.zeros(5, 6 * 64 + 100, dtype=dtype)
    wide[:, : 6 * 64] = case.q.flatten(1)
    case.q = wide[:, : 6 * 64].view(5, 6, 64)
    assert_close(case.run(), expected)


def test_shapes_that_do_not_fit_together_are_refused(cpu_path: str) -> None:
    case = AttentionCase(torch.float32, [(1, 5)], heads=5, kv_heads=2)
    with pytest.raises(ValueError, match="multiple"):
        case.run()
