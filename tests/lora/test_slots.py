import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.lora.memory.layout import Layout
from manylora.lora.memory.slots import Place, SlotBook

SHAPES = {0: (16, 16), 1: (16, 32)}
LAYOUTS = [Layout.of(ranks, SHAPES, "bfloat16") for ranks in ({0: 8}, {0: 16, 1: 8}, {1: 64})]


def size(layout: Layout) -> int:
    return layout.size_bytes


def take(book: SlotBook, layout: Layout) -> Place:
    place = book.reserve(layout)
    assert place is not None
    return place


def test_each_adapter_gets_a_slot_of_its_own_until_there_are_none() -> None:
    book = SlotBook(3, 10**9)
    slots = {take(book, LAYOUTS[0]).slot for _ in range(3)}
    assert slots == {0, 1, 2}
    assert book.reserve(LAYOUTS[0]) is None


def test_slabs_of_one_place_use_the_budget_to_the_last_byte() -> None:
    book = SlotBook(100, size(LAYOUTS[0]) + size(LAYOUTS[1]))
    take(book, LAYOUTS[0])
    take(book, LAYOUTS[1])
    assert book.used_bytes == book.budget_bytes
    assert book.reserve(LAYOUTS[0]) is None


def test_adapters_of_one_layout_share_a_slab() -> None:
    book = SlotBook(100, 10**9, places_per_slab=4)
    places = [take(book, LAYOUTS[0]) for _ in range(5)]
    assert [p.is_new_slab for p in places] == [True, False, False, False, True]
    assert sorted(p.row for p in places[:4]) == [0, 1, 2, 3]
    assert book.used_bytes == 8 * size(LAYOUTS[0])
    assert take(book, LAYOUTS[1]).slab not in {p.slab for p in places}


def test_the_last_slab_is_as_small_as_the_room_that_is_left() -> None:
    book = SlotBook(100, 3 * size(LAYOUTS[0]) + 1, places_per_slab=8)
    place = take(book, LAYOUTS[0])
    assert book.places_in(place.slab) == 3


def test_a_slab_is_given_back_with_its_last_place() -> None:
    book = SlotBook(100, 10**9, places_per_slab=4)
    first, second = take(book, LAYOUTS[0]), take(book, LAYOUTS[0])
    assert book.release(first.slot) is None
    assert book.used_bytes > 0
    assert book.release(second.slot) == second.slab
    assert book.used_bytes == 0


def test_what_is_larger_than_the_budget_can_never_be_held() -> None:
    book = SlotBook(4, size(LAYOUTS[1]) - 1)
    assert not book.can_ever_hold(LAYOUTS[1])
    assert book.can_ever_hold(LAYOUTS[0])
    assert book.reserve(LAYOUTS[1]) is None


def test_releasing_twice_is_refused() -> None:
    book = SlotBook(4, 10**9)
    place = take(book, LAYOUTS[0])
    book.release(place.slot)
    with pytest.raises(KeyError):
        book.release(place.slot)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.integers(0, 20), st.integers(1, 5), st.data())
def test_any_order_of_reserving_and_releasing_keeps_the_books(
    num_slots: int, budget: int, per_slab: int, data: st.DataObject
) -> None:
    book = SlotBook(num_slots, budget * size(LAYOUTS[0]), per_slab)
    held: dict[int, tuple[Place, Layout]] = {}
    rows: set[tuple[int, int]] = set()
    for _ in range(40):
        if len(held) > 0 and data.draw(st.booleans()):
            place, _ = held.pop(data.draw(st.sampled_from(sorted(held))))
            rows.remove((place.slab, place.row))
            freed = book.release(place.slot)
            assert (freed is not None) == all(p.slab != place.slab for p, _ in held.values())
        else:
            layout = data.draw(st.sampled_from(LAYOUTS))
            found = book.reserve(layout)
            if found is None:
                fits = book.used_bytes + size(layout) <= book.budget_bytes
                assert len(held) == num_slots or not fits
            else:
                assert found.slot not in held
                assert (found.slab, found.row) not in rows
                assert found.is_new_slab == all(slab != found.slab for slab, _ in rows)
                rows.add((found.slab, found.row))
                held[found.slot] = (found, layout)
        assert book.num_used == len(held)
        assert all(book.layout_of(s) == layout and book.place_of(s) == p for s, (p, layout) in held.items())
        book.check_integrity()
