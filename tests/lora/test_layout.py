import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.lora.memory.layout import Layout
from manylora.lora.memory.terms import ITEM_BYTES, RANK_STEP, NumberFormat, padded_rank

SHAPES = {site: (3 + 7 * site, 5 + 4 * site) for site in range(12)}


@pytest.mark.parametrize(("rank", "padded"), [(1, 4), (4, 4), (5, 8), (8, 8), (9, 16), (16, 16), (63, 64), (64, 64)])
def test_ranks_are_padded_to_the_next_step(rank: int, padded: int) -> None:
    assert padded_rank(rank) == padded


@given(
    st.dictionaries(st.sampled_from(sorted(SHAPES)), st.integers(1, 100)),
    st.sampled_from(sorted(ITEM_BYTES)),
    st.booleans(),
)
def test_matrices_have_room_and_do_not_overlap(ranks: dict[int, int], dtype: NumberFormat, has_scales: bool) -> None:
    layout = Layout.of(ranks, SHAPES, dtype, has_scales=has_scales)
    assert list(layout.low_rank) == sorted(ranks)
    end = 0
    for site, extent in layout.low_rank.items():
        assert (extent.in_features, extent.out_features) == SHAPES[site]
        assert ranks[site] <= extent.padded < ranks[site] + RANK_STEP
        assert end <= extent.a
        assert extent.a + extent.padded * extent.in_features <= extent.b
        end = extent.b + extent.padded * extent.out_features
        # in int8 too, every matrix starts on a cache line
        assert extent.a % 64 == extent.b % 64 == 0
        if has_scales:
            assert end <= extent.scales
            assert extent.scales % 64 == 0
            end = extent.scales + 4 * extent.padded // ITEM_BYTES[dtype]
    assert end <= layout.numel < end + 64


def test_nothing_touched_takes_no_room() -> None:
    assert Layout.of({}, SHAPES, "float32").numel == 0


def test_layouts_are_equal_by_padded_ranks_and_sites() -> None:
    one = Layout.of({3: 5, 1: 8}, SHAPES, "float32")
    assert one == Layout.of({1: 7, 3: 8}, SHAPES, "float32")
    assert hash(one) == hash(Layout.of({1: 7, 3: 8}, SHAPES, "float32"))
    assert one != Layout.of({1: 8}, SHAPES, "float32")
    assert one != Layout.of({3: 5, 1: 8}, SHAPES, "bfloat16")
    assert one != Layout.of({3: 5, 1: 8}, SHAPES, "float32", has_scales=True)
    assert one != Layout.of({1: 16, 3: 8}, SHAPES, "float32")
    assert one != Layout.of({1: 8, 3: 8}, {1: (99, 9), 3: SHAPES[3]}, "float32")
