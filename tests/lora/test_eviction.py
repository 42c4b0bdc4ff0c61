from hypothesis import given
from hypothesis import strategies as st

from manylora.lora.memory.eviction import GreedyDualSizeFrequency


def used(*keys: str, size: int = 100, cost: float = 100.0) -> GreedyDualSizeFrequency[str]:
    policy: GreedyDualSizeFrequency[str] = GreedyDualSizeFrequency()
    for key in keys:
        policy.on_use(key, size, cost)
    return policy


def test_the_least_used_leaves_first() -> None:
    assert used("a", "b", "a", "c", "c").victim("abc") == "b"


def test_among_equals_the_least_recently_used_leaves() -> None:
    assert used("a", "b", "c").victim("abc") == "a"
    assert used("a", "b", "a", "b").victim("ba") == "a"


def test_only_candidates_are_named() -> None:
    policy = used("a", "b", "b")
    assert policy.victim(["b"]) == "b"
    assert policy.victim([]) is None


def test_large_and_cheap_entries_leave_before_small_and_costly_ones() -> None:
    policy = used()
    policy.on_use("large", 1000, 10.0)
    policy.on_use("small", 10, 10.0)
    assert policy.victim(["small", "large"]) == "large"
    policy.on_use("costly", 1000, 10_000.0)
    assert policy.victim(["costly", "large"]) == "large"


def test_one_pass_over_many_does_not_push_out_what_is_in_steady_use() -> None:
    policy = used("steady", "steady", "steady")
    resident = {"steady"}
    for i in range(50):
        policy.on_use(f"scan{i}", 100, 100.0)
        resident.add(f"scan{i}")
        if i % 2:
            policy.on_use("steady", 100, 100.0)
        if len(resident) > 4:
            victim = policy.victim(resident)
            assert victim is not None
            resident.remove(victim)
            policy.on_remove(victim)
    assert "steady" in resident


def test_what_was_popular_once_ages() -> None:
    policy = used(*["old"] * 20)
    for i in range(200):
        policy.on_use(f"new{i}", 100, 100.0)
        policy.on_use(f"new{i}", 100, 100.0)
        victim = policy.victim([f"new{i}", "old"])
        assert victim is not None
        if victim == "old":
            return
        policy.on_remove(victim)
    raise AssertionError("twenty uses long ago outlive everything")


def test_a_removed_entry_starts_anew() -> None:
    policy = used("a", "a", "a", "b", "b")
    policy.on_remove("a")
    policy.on_use("a", 100, 100.0)
    assert policy.victim("ab") == "a"


def test_an_unknown_candidate_leaves_before_any_known_one() -> None:
    assert used("a").victim(["a", "stranger"]) == "stranger"


@given(
    st.lists(st.tuples(st.sampled_from(["use", "remove", "victim"]), st.sampled_from("abcdef"), st.integers(0, 999)))
)
def test_any_order_of_calls_keeps_the_books(calls: list[tuple[str, str, int]]) -> None:
    policy = used()
    known: set[str] = set()
    for action, key, size in calls:
        if action == "use":
            policy.on_use(key, size, float(size))
            known.add(key)
        elif action == "remove":
            policy.on_remove(key)
            known.discard(key)
        else:
            assert (policy.victim(sorted(known)) in known) == bool(known)
        policy.check_integrity()
