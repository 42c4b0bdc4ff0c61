"""The line for a place on the device: who is tried, and when again."""

import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.lora.memory.line import WaitingLine


def begin(line: WaitingLine[str], key: str, chances: int = 0, *, can_read_ahead: bool = False) -> bool:
    return line.begin(key, lambda: chances, lambda: can_read_ahead)


def test_first_come_first_tried_and_hurried_ones_before_all() -> None:
    line: WaitingLine[str] = WaitingLine()
    for key in "abcd":
        line.join(key)
    assert line.first(3) == ["a", "b", "c"]
    assert line.hurry("c")
    assert not line.hurry("c")
    assert not line.hurry("x")
    assert line.first(9) == ["c", "a", "b", "d"]
    assert line.yields("a")
    assert not line.yields("c")
    line.leave("c")
    assert not line.yields("a")


def test_one_that_was_refused_is_tried_again_once_a_place_may_have_fallen_free_and_not_before() -> None:
    line: WaitingLine[str] = WaitingLine()
    line.join("a")
    assert begin(line, "a", chances=1)
    line.refuse("a", line.moment)
    line.end("a")
    assert line.was_refused("a")
    assert not begin(line, "a", chances=1)
    line.room_appeared()
    assert begin(line, "a", chances=1)


def test_a_place_that_fell_free_while_it_was_tried_counts() -> None:
    line: WaitingLine[str] = WaitingLine()
    line.join("a")
    seen = line.moment
    line.room_appeared()
    line.refuse("a", seen)
    assert begin(line, "a", chances=1)


def test_no_more_are_tried_again_than_have_a_chance() -> None:
    line: WaitingLine[str] = WaitingLine()
    for key in "abc":
        line.join(key)
        line.refuse(key, line.moment)
    line.room_appeared()
    assert [begin(line, key, chances=2) for key in "abc"] == [True, True, False]
    line.end("a")
    assert begin(line, "c", chances=2)


def test_without_a_chance_one_is_read_ahead_once() -> None:
    line: WaitingLine[str] = WaitingLine()
    line.join("a")
    assert begin(line, "a", can_read_ahead=True)
    line.refuse("a", line.moment)
    line.end("a")
    line.room_appeared()
    assert not begin(line, "a", can_read_ahead=True)
    line.join("b")
    assert not begin(line, "b", can_read_ahead=False)
    assert line.was_refused("b")


def test_a_hurried_one_that_leaves_lets_the_others_be_tried_again() -> None:
    line: WaitingLine[str] = WaitingLine()
    for key in "ab":
        line.join(key)
    line.hurry("b")
    line.refuse("a", line.moment)
    assert not begin(line, "a", chances=1)
    line.leave("b")
    assert begin(line, "a", chances=1)


def test_tenants_are_known_by_whom_they_wait_for_until_it_leaves() -> None:
    line: WaitingLine[str] = WaitingLine()
    assert [line.join("a", tenant) for tenant in ("x", "y", "x")] == [True, True, False]
    assert not line.join("a")
    assert line.tenants_of("a") == {"x", "y"}
    line.leave("a")
    line.join("a")
    assert line.tenants_of("a") == set()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_in_any_order_whoever_waits_is_tried_in_the_end(data: st.DataObject) -> None:
    line: WaitingLine[str] = WaitingLine()
    trying: set[str] = set()
    for _ in range(data.draw(st.integers(0, 40))):
        key = data.draw(st.sampled_from("abcdef"))
        match data.draw(st.sampled_from(["join", "leave", "hurry", "begin", "refuse", "room"])):
            case "join":
                line.join(key)
            case "leave":
                line.leave(key)
            case "hurry":
                line.hurry(key)
            case "begin" if key in line and key not in trying:
                if line.begin(key, lambda: data.draw(st.integers(0, 3)), lambda: data.draw(st.booleans())):
                    trying.add(key)
            case "refuse" if key in trying:
                line.refuse(key, line.moment)
                line.end(key)
                trying.remove(key)
            case "room":
                line.room_appeared()
        line.check_integrity()
    for key in trying:
        line.end(key)
    line.room_appeared()
    assert all(line.begin(key, lambda: len(line), lambda: False) for key in line.first(len(line)))


def test_it_needs_no_torch() -> None:
    script = "import sys, manylora.lora.memory.line; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
