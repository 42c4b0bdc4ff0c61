"""Ways of choosing a request's replica. Each sees what a router sees: loads, and residency as it was a while ago."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from manylora.cluster.affinity import Arrivals, score
from manylora.identity import Tier as NamedTier
from manylora_loadtest.cluster.replicas import DEVICE, HOST, STORE, Shape, Tier

__all__ = ["POLICIES", "Policy", "View"]

Policy = Callable[["View", int], int]
"""Which replica gets a request for an adapter."""

_BOUND: Final = 1.25
_TIERS: Final[Mapping[Tier, NamedTier]] = {DEVICE: "device", HOST: "host", STORE: "disk"}


@dataclass(slots=True)
class View:
    """A router's. `loads` are requests that run or wait at each replica; those that are gone have infinity."""

    shape: Shape
    rng: np.random.Generator
    run_s: float
    now: float = 0.0
    loads: NDArray[np.float64] = field(init=False)
    known: dict[int, dict[int, Tier]] = field(default_factory=dict)  # adapter -> replica -> tier
    _orders: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    _arrivals: Arrivals = field(default_factory=Arrivals)

    def __post_init__(self) -> None:
        self.loads = np.zeros(self.shape.num_replicas)

    def note(self, adapter: int) -> None:
        """One more request for the adapter."""
        self._arrivals.note(adapter, self.now)

    def wanted_replicas(self, adapter: int) -> int:
        """How many replicas an adapter's traffic needs with half of their seats; four at least."""
        shape = self.shape
        return self._arrivals.wanted_replicas(
            adapter, self.now, run_s=self.run_s, seats=shape.seats, num_replicas=shape.num_replicas
        )

    def order(self, adapter: int) -> NDArray[np.int64]:
        """All replicas in the adapter's own order (rendezvous hashing): one replica less moves only its adapters."""
        order = self._orders.get(adapter)
        if order is None:
            keys = np.arange(self.shape.num_replicas, dtype=np.uint64) + np.uint64(adapter) * np.uint64(1_000_003)
            order = self._orders[adapter] = np.argsort(_mixed(keys), kind="stable")
        return order

    def first(self, adapter: int, count: int) -> NDArray[np.int64]:
        """The first of that order that are alive."""
        order = self.order(adapter)[: count + 8]
        alive = order[np.isfinite(self.loads[order])]
        return alive[:count] if len(alive) >= count else self._all_alive(adapter)[:count]

    def _all_alive(self, adapter: int) -> NDArray[np.int64]:
        order = self.order(adapter)
        return order[np.isfinite(self.loads[order])]

    def some(self, count: int) -> list[int]:
        """Replicas by chance, each alive."""
        found: list[int] = []
        while len(found) < count:
            replica = int(self.rng.integers(self.shape.num_replicas))
            if math.isfinite(self.loads[replica]):
                found.append(replica)
        return found

    def least_loaded(self) -> int:
        least = np.flatnonzero(self.loads == self.loads.min())
        return int(least[self.rng.integers(len(least))])

    def tiers(self, adapter: int) -> Mapping[int, Tier]:
        """Where the adapter is known to be in memory."""
        return self.known.get(adapter, {})


def _mixed(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser."""
    with np.errstate(over="ignore"):
        keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


def at_random(view: View, _adapter: int) -> int:
    return view.some(1)[0]


def least_loaded(view: View, _adapter: int) -> int:
    return view.least_loaded()


def two_choices(view: View, _adapter: int) -> int:
    return min(view.some(2), key=lambda replica: view.loads[replica])


def hashing(view: View, adapter: int) -> int:
    return int(view.first(adapter, 1)[0])


def bounded_hashing(view: View, adapter: int) -> int:
    """The first of the adapter's order that has not more than a quarter above the mean."""
    bound = _BOUND * (view.loads[np.isfinite(view.loads)].mean() + 1)
    for replica in view.order(adapter):
        if view.loads[replica] < bound:
            return int(replica)
    return view.least_loaded()


def warm_first(view: View, adapter: int) -> int:
    """The least busy one that has the adapter and a free seat, else the least busy of all."""
    free = [replica for replica in view.tiers(adapter) if view.loads[replica] < view.shape.seats]
    return min(free, key=lambda replica: view.loads[replica]) if free else view.least_loaded()


def subset(view: View, adapter: int) -> int:
    """The least busy of the first k of the adapter's order, where k grows with its traffic."""
    first = view.first(adapter, view.wanted_replicas(adapter))
    return int(first[np.argmin(view.loads[first])])


def scored(view: View, adapter: int) -> int:
    """The best of the first k of the adapter's order, those that have it, and two by chance: warm, and not busy."""
    tiers = view.tiers(adapter)
    candidates = dict.fromkeys(int(replica) for replica in view.first(adapter, view.wanted_replicas(adapter)))
    candidates.update(dict.fromkeys(replica for replica in tiers if math.isfinite(view.loads[replica])))
    candidates.update(dict.fromkeys(view.some(2)))

    def worth(replica: int) -> float:
        return score(_TIERS[tiers.get(replica, STORE)], float(view.loads[replica]), view.shape.seats)

    return max(candidates, key=worth)


POLICIES: Final[Mapping[str, Policy]] = {
    "random": at_random,
    "least loaded": least_loaded,
    "two choices": two_choices,
    "hashing": hashing,
    "bounded hashing": bounded_hashing,
    "warm first": warm_first,
    "k of its order": subset,
    "candidates and score": scored,
}
