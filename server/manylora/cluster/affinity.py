"""Which replica a request goes to: one that has its adapter in memory, unless it is so much busier than another.

Candidates are the first few replicas of the adapter's own order (rendezvous hashing), those that have it in memory and
two by chance; the best has the highest warmth less its load. So an adapter's copies stay few, a popular one spreads,
and a replica that comes or goes moves its own adapters only. docs/scale.md compares this with other policies.
"""

import math
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final

from manylora.identity import Tier

__all__ = ["LEAST_REPLICAS", "Affinity", "Arrivals", "Seen", "score"]

LEAST_REPLICAS: Final = 4
_RATE_S: Final = 10.0  # over which an adapter's traffic is averaged
_MAX_KEYS: Final = 100_000
_WARMTH: Final[Mapping[Tier, float]] = {"device": 1.0, "host": 0.7, "disk": 0.3}
_NUM_BY_CHANCE: Final = 2


def score(tier: Tier, load: float, seats: int) -> float:
    """What a replica is worth to a request whose adapter is in `tier` there, with `load` requests on its `seats`."""
    return _WARMTH[tier] - load / seats


class Arrivals:
    """How often each adapter is asked for, as an average over the last seconds; of those that were asked for last."""

    def __init__(self) -> None:
        self._rates: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()  # requests a second, and when

    def note(self, key: Hashable, now: float) -> None:
        """One more request at `now`, in seconds that never go back."""
        self._rates[key] = self.rate(key, now) + 1 / _RATE_S, now
        self._rates.move_to_end(key)
        if len(self._rates) > _MAX_KEYS:
            self._rates.popitem(last=False)

    def rate(self, key: Hashable, now: float) -> float:
        """Requests a second."""
        rate, at = self._rates.get(key, (0.0, now))
        return rate * math.exp((at - now) / _RATE_S)

    def wanted_replicas(self, key: Hashable, now: float, *, run_s: float, seats: int, num_replicas: int) -> int:
        """How many replicas an adapter's requests, of `run_s` each, fill to a half; a few at least, all at most."""
        return min(max(LEAST_REPLICAS, math.ceil(2 * self.rate(key, now) * run_s / seats)), num_replicas)


@dataclass(frozen=True, slots=True)
class Seen:
    """One replica as a router knows it: requests that it has, how many run at once there, adapters in its memory."""

    name: str
    load: int
    seats: int
    tiers: Mapping[str, Tier] = field(default_factory=dict)


class Affinity:
    """One of `num_routers` routers, which see a share of all requests each. `clock`: seconds that never go back."""

    def __init__(
        self,
        *,
        num_routers: int = 1,
        chance: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_routers = num_routers
        self._chance = chance or random.Random()
        self._clock = clock
        self._arrivals = Arrivals()
        self._run_s = 1.0

    def note(self, key: str) -> None:
        """One more request for the adapter that routers know as `key`."""
        self._arrivals.note(key, self._clock())

    def note_end(self, seconds: float) -> None:
        """A request has taken so long."""
        self._run_s += (seconds - self._run_s) / 50

    def ranked(self, key: str, replicas: Sequence[Seen]) -> list[Seen]:
        """All replicas, the best one for the adapter first; without a key, the least busy one."""
        shuffled = self._chance.sample(replicas, len(replicas))
        by_load = sorted(shuffled, key=lambda seen: seen.load / seen.seats)
        if not key or len(replicas) < 2:
            return by_load
        candidates = self._candidates(key, shuffled)
        best = sorted(candidates, key=lambda seen: -score(seen.tiers.get(key, "disk"), seen.load, seen.seats))
        names = {seen.name for seen in candidates}
        return [*best, *(seen for seen in by_load if seen.name not in names)]

    def _candidates(self, key: str, replicas: Sequence[Seen]) -> list[Seen]:
        """In the adapter's order, in which equals stay."""
        seats = min(seen.seats for seen in replicas)
        wanted = self._arrivals.wanted_replicas(
            key,
            self._clock(),
            run_s=self._run_s * self._num_routers,
            seats=seats,
            num_replicas=len(replicas),
        )
        ordered = sorted(replicas, key=lambda seen: _place(seen.name, key))
        by_chance = {seen.name for seen in replicas[:_NUM_BY_CHANCE]}
        return [s for place, s in enumerate(ordered) if place < wanted or key in s.tiers or s.name in by_chance]


def _place(replica: str, key: str) -> bytes:
    return blake2b(f"{replica}/{key}".encode(), digest_size=8).digest()
