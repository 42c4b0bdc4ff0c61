"""What there is in the engine at one moment: counts for `/v1/stats` and the gauges, and which adapters are where."""

from dataclasses import dataclass, field
from typing import Any

from manylora.identity import AdapterRef

__all__ = ["EngineStats", "Residency", "SnapshotCounts"]


@dataclass(frozen=True, slots=True)
class SnapshotCounts:
    """Rooms with a copy in them, rooms there are, the copies' bytes, and sequences that began with a copy."""

    used: int = 0
    total: int = 0
    bytes: int = 0
    hits: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts at one moment, for `/v1/stats` and the gauges: of all, or of what belongs to one tenant.

    For a tenant, `resident` also has the public adapters, whose `users` are its own sequences, and `steps` and
    `snapshots` are 0.
    """

    running: int = 0
    waiting: int = 0
    waiting_for_adapter: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    slots_used: int = 0
    slots_total: int = 0
    device_tier_bytes: int = 0
    host_tier_bytes: int = 0
    preemptions: int = 0
    steps: int = 0
    snapshots: SnapshotCounts = field(default_factory=SnapshotCounts)
    resident: tuple[dict[str, Any], ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Residency:
    """Which adapters are in memory, in `num_slots` slots of the device and beside it, and what requests ask for.

    `running` are those that sequences of the batch use, `waiting` those that are waited for; `pinned` are ids.
    """

    num_slots: int = 0
    device: tuple[AdapterRef, ...] = ()
    host: tuple[AdapterRef, ...] = ()
    running: tuple[AdapterRef, ...] = ()
    waiting: tuple[AdapterRef, ...] = ()
    pinned: frozenset[str] = frozenset()

    @property
    def activity(self) -> tuple[tuple[AdapterRef, ...], tuple[AdapterRef, ...]]:
        return self.running, self.waiting

    def refs(self) -> set[AdapterRef]:
        """All of them."""
        return {*self.device, *self.host, *self.running, *self.waiting}
