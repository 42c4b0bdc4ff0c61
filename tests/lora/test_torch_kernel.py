"""The kernels behind `LoraPlan`, over real slots and memory, against the specification in kernels/reference.py."""

from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import pytest
import torch

from manylora.kernels.interface import LoraKernel, LoraPlan, SiteGroup
from manylora.kernels.reference import LowRank, add_lora
from manylora.kernels.rows import group_rows
from manylora.kernels.torch_lora import MAX_BATCHED_ROWS, TorchKernel
from manylora.lora.memory.device_memory import DeviceMemory
from manylora.lora.memory.packing import PackedAdapter
from manylora.lora.memory.slots import SlotBook
from tests.engine.harness import BACKENDS, available_kernels
from tests.kernels.lora_case import POPULARITIES, draw_slots
from tests.kernels.tolerance import TOLERANCES, assert_same_bits
from tests.lora.packed import random_packed

CPU = torch.device("cpu")
DTYPES = tuple(TOLERANCES)
MIXED = (1, 64, 3, 16, 8, 16, 5, 64)
pytestmark = pytest.mark.parametrize("kernel_name", available_kernels)


@dataclass
class Fleet:
    """Adapters on a device; `ranks[i]` is adapter i's by site. `pairs[slot]`: its matrices by site."""

    kernel: LoraKernel
    widths: tuple[int, ...]
    ranks: list[dict[int, int]]
    in_features: int = 48
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None  # that of the rows if it is not said
    embeddings: frozenset[int] = frozenset()
    pairs: dict[int, dict[int, LowRank]] = field(default_factory=dict)
    slots: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        shapes = {site: (self.in_features, width) for site, width in enumerate(self.widths)}
        weights = self.weight_dtype or self.dtype
        book = SlotBook(len(self.ranks) + 3, 2**26, self.kernel.places_per_slab)
        self.memory = DeviceMemory(len(shapes), len(self.ranks) + 3, CPU)
        for seed, ranks in enumerate(self.ranks):
            packed, pairs = random_packed(ranks, shapes, seed=seed, dtype=weights, embeddings=self.embeddings)
            place = book.reserve(packed.layout)
            assert place is not None
            if place.is_new_slab:
                self.memory.allocate(place, packed.layout, book.places_in(place.slab))
                self.memory.slabs[place.slab].data.view(torch.uint8).fill_(
                    0xFF
                )  # NaN in floats: places without an adapter hold anything
            self.memory.fill(place, packed)
            self.memory.publish(place, packed)
            self.pairs[place.slot] = pairs
            self.slots.append(place.slot)

    def group(self, first: int = 0, count: int | None = None) -> SiteGroup:
        offsets = tuple(accumulate(self.widths[first:][:count], initial=0))
        return SiteGroup(first, offsets, torch.tensor(offsets, dtype=torch.int32))

    def plan(self, row_slots: list[int]) -> LoraPlan:
        rows = group_rows(np.array(row_slots, dtype=np.int32), self.memory.touches, CPU)
        assert rows is not None
        return self.kernel.plan(rows, self.memory)

    def rows(self, popularity: str, count: int) -> list[int]:
        """Each row's slot, -1 for the base, drawn over the adapters."""
        drawn = draw_slots(popularity, count, len(self.slots), torch.Generator().manual_seed(count))
        return [self.slots[i] if i >= 0 else -1 for i in drawn.tolist()]

    def inputs(self, count: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        g = torch.Generator().manual_seed(count)
        x, out = torch.randn(count, self.in_features, generator=g), torch.randn(count, columns, generator=g)
        return x.to(self.dtype), out.to(self.dtype)

    def check(self, row_slots: list[int], group: SiteGroup) -> None:
        """Every row is what the specification gives, member by member."""
        x, out = self.inputs(len(row_slots), group.offsets[-1])
        actual = out.clone()
        self.plan(row_slots).add_(actual, x, group)
        for member, site in enumerate(group.sites):
            columns = slice(group.offsets[member], group.offsets[member + 1])
            weights = [self.pairs.get(slot, {}).get(site) for slot in range(max(row_slots) + 1)]
            assert_near(actual[:, columns], add_lora(out[:, columns], x, weights, row_slots), self.kernel)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, kernel: LoraKernel) -> None:
    relative, absolute = TOLERANCES[actual.dtype]
    if isinstance(kernel, TorchKernel) and actual.dtype is not torch.float32:
        # Plain torch also rounds what lies between the two products, and the delta before it is added.
        relative, absolute = 4 * relative, 16 * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.float(), expected.float(), rtol=relative, atol=absolute)


def fleet(kernel_name: str, ranks: tuple[int, ...], *, width: int = 40, **options: object) -> Fleet:
    return Fleet(BACKENDS[kernel_name].lora, (width,), [{0: r} for r in ranks], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 64])
@pytest.mark.parametrize(("in_features", "width"), [(1, 1), (7, 5), (64, 96), (97, 203)])
def test_delta_is_right_for_every_rank_and_width(
    kernel_name: str, dtype: torch.dtype, rank: int, in_features: int, width: int
) -> None:
    made = fleet(kernel_name, (rank,) * 3, width=width, in_features=in_features, dtype=dtype)
    made.check(made.rows("uniform", 7), made.group())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("rows", [1, 2, MAX_BATCHED_ROWS, 2 * MAX_BATCHED_ROWS + 1, 60])
def test_delta_is_right_for_every_mix_of_rows_and_ranks(
    kernel_name: str, dtype: torch.dtype, popularity: str, rows: int
) -> None:
    made = fleet(kernel_name, MIXED, dtype=dtype)
    made.check(made.rows(popularity, rows), made.group())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", [*DTYPES, torch.int8], ids=str)
def test_adapters_may_be_kept_in_another_type_than_the_model(
    kernel_name: str, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    made = fleet(kernel_name, MIXED, dtype=dtype, weight_dtype=weight_dtype)
    made.check([*made.slots, -1, *reversed(made.slots), *[made.slots[1]] * (MAX_BATCHED_ROWS + 2)], made.group())


def test_many_adapters_of_one_layout_with_long_and_short_segments(kernel_name: str) -> None:
    made = fleet(kernel_name, (8,) * 40)
    prefill = [made.slots[i] for i in (0, 35, 39) for _ in range(20)]
    decode = [made.slots[i] for i in range(0, 40, 3)]
    made.check([*prefill, -1, *decode, *decode[:5], -1], made.group())


def test_adapters_that_share_no_site_or_some_or_all_of_a_group(kernel_name: str) -> None:
    ranks = [{0: 8, 1: 4, 2: 16}, {0: 3}, {1: 8}, {2: 1, 3: 64}, {3: 8}, {0: 8, 2: 8}]
    made = Fleet(BACKENDS[kernel_name].lora, (24, 17, 40, 9), ranks)
    row_slots = [*made.slots, -1, *reversed(made.slots), *[made.slots[0]] * 7]
    for group in (made.group(0, 3), made.group(3, 1), made.group(0, 4), made.group(1, 2)):
        made.check(row_slots, group)


def test_members_and_rows_that_nothing_touches_keep_every_bit(kernel_name: str) -> None:
    made = Fleet(BACKENDS[kernel_name].lora, (24, 17), [{0: 8}, {1: 8}])
    row_slots = [made.slots[0], -1, made.slots[1], made.slots[0]]
    group = made.group()
    x, out = made.inputs(4, 41)
    actual = out.clone()
    made.plan(row_slots).add_(actual, x, group)
    assert_same_bits(actual[1], out[1])
    assert_same_bits(actual[[0, 3], 24:], out[[0, 3], 24:])
    assert_same_bits(actual[2, :24], out[2, :24])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", ["nan", "inf", "largest"])
@pytest.mark.parametrize("rows", [1, MAX_BATCHED_ROWS + 3])
def test_spoiled_adapter_moves_no_bit_of_its_neighbours(
    kernel_name: str, dtype: torch.dtype, value: str, rows: int
) -> None:
    made = fleet(kernel_name, (8,) * 5, dtype=dtype)
    row_slots = [slot for slot in made.slots for _ in range(rows)] + [-1]
    x, out = made.inputs(len(row_slots), 40)
    clean, beside = out.clone(), out.clone()
    made.plan(row_slots).add_(clean, x, made.group())
    spoiled = made.slots[2]
    place = made.memory.places[spoiled]
    layout = made.memory.slabs[place.slab].layout
    number = torch.finfo(dtype).max if value == "largest" else float(value)
    made.memory.fill(place, PackedAdapter(layout, {0: 8}, torch.full((layout.numel,), number, dtype=dtype)))
    made.plan(row_slots).add_(beside, x, made.group())
    others = torch.tensor(row_slots) != spoiled
    assert_same_bits(beside[others], clean[others])
    assert not torch.isfinite(beside[~others]).any()


def test_spoiled_input_row_moves_no_bit_of_the_others(kernel_name: str) -> None:
    made = fleet(kernel_name, (8,) * 3)
    row_slots = made.rows("uniform", 9)
    x, out = made.inputs(9, 40)
    clean, beside = out.clone(), out.clone()
    made.plan(row_slots).add_(clean, x, made.group())
    x[4] = float("nan")
    made.plan(row_slots).add_(beside, x, made.group())
    kept = torch.arange(9) != 4
    assert_same_bits(beside[kept], clean[kept])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", [None, torch.int8], ids=str)
def test_embedding_deltas_are_the_tokens_own_rows(
    kernel_name: str, dtype: torch.dtype, weight_dtype: torch.dtype | None
) -> None:
    made = Fleet(
        BACKENDS[kernel_name].lora,
        (40, 16),
        [{0: 8}, {0: 3, 1: 8}, {1: 8}],
        in_features=100,
        dtype=dtype,
        weight_dtype=weight_dtype,
        embeddings=frozenset({0}),
    )
    row_slots = [made.slots[i] for i in (0, 1, 2, 1, 0, 0)] + [-1]
    token_ids = torch.tensor([5, 99, 5, 0, 5, 7, 8])
    one_hot = torch.nn.functional.one_hot(token_ids, 100).to(dtype)
    actual = torch.zeros(7, 40, dtype=dtype)
    group = SiteGroup(0, (0, 40), torch.tensor((0, 40), dtype=torch.int32))
    made.plan(row_slots).add_embedding_(actual, token_ids, group, 1.0)
    weights = [made.pairs.get(slot, {}).get(0) for slot in range(max(row_slots) + 1)]
    expected = add_lora(torch.zeros(7, 40, dtype=dtype), one_hot, weights, row_slots)
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCES[dtype][0], atol=TOLERANCES[dtype][1])
    assert not actual[[2, 6]].any()


def test_an_untouched_site_is_marked_so_that_layers_skip_it(kernel_name: str) -> None:
    made = Fleet(BACKENDS[kernel_name].lora, (24, 17, 8), [{0: 8}, {1: 8}])
    assert made.plan([made.slots[0], -1]).rows.touched == [True, False, False]
    assert made.plan([made.slots[0], made.slots[1]]).rows.touched == [True, True, False]
