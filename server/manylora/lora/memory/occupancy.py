"""How long adapters sit in device slots: who came, who left, and since when. Bookkeeping, no tensors."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from manylora.identity import AdapterRef

__all__ = ["Occupancy", "Stay"]


def _monotonic_us() -> int:
    return time.monotonic_ns() // 1000


@dataclass(frozen=True, slots=True)
class Stay:
    """One adapter's time in a slot, or a piece of it, in microseconds of `Occupancy.clock_us`."""

    tenant: str
    adapter: str
    start_us: int
    end_us: int


class Occupancy:
    """Thread-safe. Each microsecond of a stay is handed out by `take` once: the pieces of a stay meet, and their
    lengths are whole numbers, so that sums over them are exact.
    """

    def __init__(self, clock_us: Callable[[], int] = _monotonic_us) -> None:
        self.clock_us = clock_us
        self._lock = threading.Lock()
        self._since: dict[str, tuple[AdapterRef, int]] = {}  # by the adapter's id
        self._ended: list[Stay] = []

    def enter(self, ref: AdapterRef) -> None:
        """A slot is the adapter's from now on."""
        with self._lock:
            self._since[ref.id] = ref, self.clock_us()

    def leave(self, ref: AdapterRef) -> None:
        """Note that the adapter's slot is free again."""
        with self._lock:
            entered = self._since.pop(ref.id, None)
            if entered is not None:
                self._ended.append(Stay(ref.tenant, ref.name, entered[1], self.clock_us()))

    def take(self) -> list[Stay]:
        """What has not been taken yet, up to now; those who stay are cut here."""
        with self._lock:
            now = self.clock_us()
            ended, self._ended = self._ended, []
            for key, (ref, since) in self._since.items():
                ended.append(Stay(ref.tenant, ref.name, since, now))
                self._since[key] = ref, now
            return [stay for stay in ended if stay.end_us > stay.start_us]
