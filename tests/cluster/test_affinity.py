"""Which replica a request goes to, without a cluster."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from manylora.cluster.affinity import LEAST_REPLICAS, Affinity, Arrivals, Seen, score
from manylora.identity import Tier

SEATS = 16


def some(count: int, load: int = 0) -> list[Seen]:
    return [Seen(f"replica-{number}", load, SEATS) for number in range(count)]


def router() -> Affinity:
    return Affinity(chance=random.Random(1), clock=lambda: 0.0)


def holding(replicas: list[Seen], place: int, tier: Tier, *, load: int = 0) -> list[Seen]:
    changed = replace(replicas[place], tiers={"key/x": tier}, load=load)
    return [*replicas[:place], changed, *replicas[place + 1 :]]


@pytest.mark.parametrize("tier", ["device", "host"])
def test_a_request_goes_where_its_adapter_is(tier: Tier) -> None:
    for place in range(20):
        assert router().ranked("key/x", holding(some(20), place, tier))[0].name == f"replica-{place}"


def test_a_replica_that_is_much_busier_is_left_alone() -> None:
    busy = holding(some(20), 3, "device", load=SEATS)

    assert router().ranked("key/x", busy)[0].name != "replica-3"
    assert score("device", SEATS // 2, SEATS) > score("disk", 0, SEATS) > score("device", SEATS, SEATS)


def test_routers_agree_on_a_few_replicas_for_an_adapter_that_is_nowhere() -> None:
    first = [Affinity(chance=random.Random(seed)).ranked("key/x", some(40, load=1)) for seed in range(30)]
    chosen = Counter(ranked[0].name for ranked in first)

    # Each takes one of the adapter's own few, or one of two by chance.
    own = [name for name, _ in chosen.most_common(LEAST_REPLICAS)]
    assert sum(chosen[name] for name in own) >= 15
    assert all(len(ranked) == len({seen.name for seen in ranked}) == 40 for ranked in first)


def test_without_an_adapter_the_least_busy_is_first() -> None:
    replicas = [replace(seen, load=number) for number, seen in enumerate(some(5))]

    assert [seen.load for seen in router().ranked("", replicas)] == [0, 1, 2, 3, 4]


def test_a_replica_that_goes_moves_its_own_adapters_only() -> None:
    def own(key: str, replicas: list[Seen]) -> set[str]:
        found = set.intersection(
            *({seen.name for seen in Affinity(chance=random.Random(s))._candidates(key, replicas)} for s in range(8))
        )
        return found - {"replica-7"}

    replicas = some(40)
    rest = [seen for seen in replicas if seen.name != "replica-7"]

    for number in range(20):
        assert own(f"key/{number}", replicas) <= own(f"key/{number}", rest)


def test_an_adapters_traffic_asks_for_more_replicas_and_is_forgotten() -> None:
    arrivals = Arrivals()

    def wanted(now: float) -> int:
        return arrivals.wanted_replicas("x", now, run_s=2.0, seats=SEATS, num_replicas=100)

    assert wanted(0.0) == LEAST_REPLICAS
    for number in range(10_000):  # 200 a second
        arrivals.note("x", number / 200)
    assert 45 <= wanted(50.0) <= 55
    assert wanted(200.0) == LEAST_REPLICAS


def test_a_hot_adapter_spreads() -> None:
    """A burst goes to several replicas, though one has the adapter already."""
    replicas = holding(some(3), 0, "device")
    affinity, sent = router(), Counter[str]()
    for _ in range(60):
        affinity.note("key/x")
        best = affinity.ranked("key/x", [replace(s, load=s.load + sent[s.name]) for s in replicas])[0]
        sent[best.name] += 1

    assert len(sent) == 3
    assert max(sent.values()) <= 30
