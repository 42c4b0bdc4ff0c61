"""Which adapter leaves a tier when room is needed. No tensors, no clocks: a policy over numbers."""

from collections.abc import Hashable, Iterable
from typing import Protocol, TypeVar

K = TypeVar("K", bound=Hashable)


class EvictionPolicy(Protocol[K]):
    """Remembers use, names a victim."""

    def on_use(self, key: K, size_bytes: int, cost: float) -> None: ...

    def on_remove(self, key: K) -> None: ...

    def victim(self, candidates: Iterable[K]) -> K | None: ...


class GreedyDualSizeFrequency(EvictionPolicy[K]):
    """Greedy-Dual-Size-Frequency (Cherkasova, HP Labs HPL-98-69, 1998).

    Each entry has the priority `clock + frequency * cost / size`; the lowest leaves, and the clock moves up to
    its priority, so that entries nobody uses any more age. Costly to bring back, small and often used stays.
    A single pass over many adapters does not push out the ones in steady use, as least-recently-used would.
    """

    def __init__(self) -> None:
        self._clock = 0.0
        self._tick = 0
        self._frequency: dict[K, int] = {}
        self._priority: dict[K, tuple[float, int]] = {}

    def on_use(self, key: K, size_bytes: int, cost: float) -> None:
        """Count one use. `cost` is what bringing it back takes, in any one unit, such as bytes to read."""
        self._tick += 1
        frequency = self._frequency.get(key, 0) + 1
        self._frequency[key] = frequency
        self._priority[key] = (self._clock + frequency * cost / max(1, size_bytes), self._tick)

    def on_remove(self, key: K) -> None:
        """Forget an entry that left for whatever reason."""
        self._frequency.pop(key, None)
        self._priority.pop(key, None)

    def victim(self, candidates: Iterable[K]) -> K | None:
        """The candidate to evict, ties by least recent use; None when there is none."""
        chosen = min(candidates, key=lambda k: self._priority.get(k, (0.0, 0)), default=None)
        if chosen is not None:
            self._clock = max(self._clock, self._priority.get(chosen, (0.0, 0))[0])
        return chosen

    def check_integrity(self) -> None:
        assert self._frequency.keys() == self._priority.keys()
