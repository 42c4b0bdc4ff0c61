"""Simulated servers: seats for requests, device slots and host places for adapters, a queue. Time is whoever calls."""

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Final, Literal

__all__ = ["DEVICE", "HOST", "STORE", "Replica", "Shape", "Tier"]

Tier = Literal[0, 1, 2]
STORE: Final[Tier] = 0
HOST: Final[Tier] = 1
DEVICE: Final[Tier] = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """What every replica has, and what a load costs while it holds the request's seat."""

    num_replicas: int = 100
    seats: int = 16
    device_slots: int = 64
    host_places: int = 500
    host_load_s: float = 0.03
    store_load_s: float = 0.6
    known_after_s: float = 1.0
    """So late the router hears which adapters a replica has."""

    def load_s(self, tier: Tier) -> float:
        return (self.store_load_s, self.host_load_s, 0.0)[tier]


@dataclass(slots=True)
class Replica:
    """One server. Adapters leave either tier by least recent use."""

    shape: Shape
    is_alive: bool = True
    running: set[int] = field(default_factory=set)
    queue: deque[int] = field(default_factory=deque)
    device: OrderedDict[int, None] = field(default_factory=OrderedDict)
    host: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def take(self, adapter: int) -> tuple[Tier, list[tuple[int, Tier]]]:
        """Where the adapter was before it was brought to the device, and which adapters are in another tier now."""
        if adapter in self.device:
            self.device.move_to_end(adapter)
            if adapter in self.host:
                self.host.move_to_end(adapter)
            return DEVICE, []
        tier: Tier = HOST if adapter in self.host else STORE
        changed: list[tuple[int, Tier]] = [(adapter, DEVICE)]
        self.host[adapter] = None
        self.host.move_to_end(adapter)
        if len(self.host) > self.shape.host_places:
            gone, _ = self.host.popitem(last=False)
            if gone not in self.device:
                changed.append((gone, STORE))
        self.device[adapter] = None
        if len(self.device) > self.shape.device_slots:
            gone, _ = self.device.popitem(last=False)
            changed.append((gone, HOST if gone in self.host else STORE))
        return tier, changed

    def die(self) -> list[int]:
        """The replica's requests, by number, which another one has to answer. What it held of adapters is gone."""
        lost = [*self.running, *self.queue]
        self.is_alive = False
        self.running.clear()
        self.queue.clear()
        self.device.clear()
        self.host.clear()
        return lost
