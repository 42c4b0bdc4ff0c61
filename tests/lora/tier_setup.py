"""Tiers over real slots and memory, and a disk that can be made to fail."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from manylora.identity import AdapterRef, Tier
from manylora.kernels.reference import LowRank
from manylora.lora.format.spec import Adapter
from manylora.lora.memory.device_memory import DeviceMemory
from manylora.lora.memory.packing import PackedAdapter
from manylora.lora.memory.slots import SlotBook
from manylora.lora.memory.tiers import AdapterTiers, TierEvents
from tests.lora.packed import random_packed

SHAPES = {0: (16, 16), 1: (16, 32)}
RANKS = ({0: 8}, {0: 8}, {0: 16, 1: 8}, {1: 4})
SMALL = random_packed({0: 8}, SHAPES)[0].size_bytes
PATIENCE_S = 20.0


def ref(number: int) -> AdapterRef:
    return AdapterRef(f"id-{number}", "tenant", f"adapter-{number}", 1, f"digest-{number}")


def numbered(number: int) -> Adapter:
    """What the reader makes of adapter N. Only its digest is looked at, by `Disk.pack`."""
    return Adapter(8, 8.0, [], None, (), f"digest-{number}", 0, [], [], "lora")


def weights(number: int) -> tuple[PackedAdapter, dict[int, LowRank]]:
    return random_packed(RANKS[number % len(RANKS)], SHAPES, seed=number)


class Recorder(TierEvents):
    """Counts what the tiers report."""

    def __init__(self) -> None:
        self.loads: list[Tier] = []
        self.evictions: list[Tier] = []
        self.failures: list[AdapterRef] = []

    def on_load(self, ref: AdapterRef, tier: Tier, seconds: float) -> None:
        assert seconds >= 0
        self.loads.append(tier)

    def on_failure(self, ref: AdapterRef) -> None:
        self.failures.append(ref)

    def on_eviction(self, ref: AdapterRef, tier: Tier) -> None:
        self.evictions.append(tier)


@dataclass
class Disk:
    """What the loader finds for `id-N`: adapter N, unless `broken`, when `gate` and its own in `slow` are open."""

    broken: dict[int, Exception] = field(default_factory=dict)
    gate: threading.Event = field(default_factory=threading.Event)
    slow: dict[int, threading.Event] = field(default_factory=dict)
    reads: list[int] = field(default_factory=list)
    make: Callable[[int], tuple[PackedAdapter, dict[int, LowRank]]] = weights

    def __post_init__(self) -> None:
        self.gate.set()

    def read(self, ref: AdapterRef) -> Adapter:
        assert self.gate.wait(PATIENCE_S)
        number = int(ref.id.removeprefix("id-"))
        assert number not in self.slow or self.slow[number].wait(PATIENCE_S)
        self.reads.append(number)
        if number in self.broken:
            raise self.broken[number]
        return numbered(number)

    def pack(self, adapter: Adapter) -> PackedAdapter:
        return self.make(int(adapter.digest.removeprefix("digest-")))[0]


class Setup:
    """Tiers over real slots and memory, and a disk that can be made to fail."""

    def __init__(
        self,
        *,
        slots: int = 4,
        device_bytes: int = 2**20,
        host_bytes: int = 2**20,
        places_per_slab: int = 1,
        threads: int = 1,
        disk: Disk | None = None,
    ) -> None:
        self.disk = disk or Disk()
        self.events = Recorder()
        self.changed = threading.Event()
        self.book = SlotBook(slots, device_bytes, places_per_slab)
        self.memory = DeviceMemory(len(SHAPES), slots, torch.device("cpu"))
        self.tiers = AdapterTiers(
            self.book,
            self.memory,
            host_bytes=host_bytes,
            read=self.disk.read,
            pack=self.disk.pack,
            on_change=self.changed.set,
            events=self.events,
            num_threads=threads,
        )

    def get(self, number: int) -> int:
        """The slot, as the engine gets it: asking again whenever something has changed."""
        while True:
            slot = self.tiers.acquire(ref(number))
            if slot is not None:
                return slot
            assert self.changed.wait(PATIENCE_S)
            self.changed.clear()

    def use(self, number: int) -> None:
        self.get(number)
        self.tiers.release(ref(number))

    def settle(self) -> None:
        """Wait until nothing is being loaded."""
        while any(e.is_loading for e in list(self.tiers._entries.values())):
            assert self.changed.wait(PATIENCE_S)
            self.changed.clear()
        self.tiers.check_integrity()

    def holds(self, number: int, slot: int) -> bool:
        """The slot has this adapter's weights and no others."""
        pairs = self.disk.make(number)[1]
        for site in SHAPES:
            found = self.memory.matrices(slot, site)
            if (found is None) != (site not in pairs):
                return False
            if found is not None and not (
                torch.equal(found[0], pairs[site].a) and torch.equal(found[1], pairs[site].b)
            ):
                return False
        return True
