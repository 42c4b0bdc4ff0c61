"""The host tier: packed adapters in memory beside the device, least recently asked for out first."""

from collections import OrderedDict
from collections.abc import Callable, Container, Iterator

from manylora.identity import AdapterRef
from manylora.lora.memory.packing import PackedAdapter


class HostCache:
    """Adapters within a byte budget. Whoever changes it holds the tiers' lock (`is_held`)."""

    def __init__(
        self, budget_bytes: int, on_eviction: Callable[[AdapterRef], None], is_held: Callable[[], bool]
    ) -> None:
        self.used_bytes = 0
        self._budget_bytes = budget_bytes
        self._on_eviction = on_eviction
        self._is_held = is_held
        self._kept: OrderedDict[AdapterRef, PackedAdapter] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[AdapterRef]:
        return iter(self._kept)

    def __contains__(self, ref: AdapterRef) -> bool:
        return ref in self._kept

    def used_bytes_of(self, tenant: str) -> int:
        """Of the adapters that this tenant owns."""
        return sum(packed.size_bytes for ref, packed in self._kept.items() if ref.tenant == tenant)

    def get(self, ref: AdapterRef) -> PackedAdapter | None:
        """The adapter, which is now the most recently asked for."""
        assert self._is_held()
        packed = self._kept.get(ref)
        if packed is not None:
            self._kept.move_to_end(ref)
        return packed

    def keep(self, ref: AdapterRef, packed: PackedAdapter, wanted: Container[str]) -> None:
        """Keep it if there is room, or room can be made of adapters that nobody waits for.

        `wanted`: ids of those that are waited for; pushing one out would only have it read again.
        """
        assert self._is_held()
        doomed = self._room_for(packed.size_bytes, wanted)
        if ref in self._kept or doomed is None:
            return
        for old in doomed:
            self.drop(old)
            self._on_eviction(old)
        self._kept[ref] = packed
        self.used_bytes += packed.size_bytes

    def could_keep(self, size_bytes: int, wanted: Container[str]) -> bool:
        """Whether `keep` would keep an adapter of that size."""
        return self._room_for(size_bytes, wanted) is not None

    def _room_for(self, size_bytes: int, wanted: Container[str]) -> list[AdapterRef] | None:
        """Who has to go for so many bytes; None if that is not possible."""
        doomed: list[AdapterRef] = []
        short = self.used_bytes + size_bytes - self._budget_bytes
        for old, candidate in self._kept.items():
            if short <= 0:
                break
            if old.id not in wanted:
                doomed.append(old)
                short -= candidate.size_bytes
        return doomed if short <= 0 else None

    def bequeath(self, ref: AdapterRef, heir: AdapterRef | None) -> None:
        """Hand the adapter over to a reference to the same content; drop it where there is no such heir."""
        packed = self._kept.get(ref)
        self.drop(ref)
        if packed is not None and heir is not None and heir.digest == ref.digest and heir not in self._kept:
            self._kept[heir] = packed
            self.used_bytes += packed.size_bytes

    def drop(self, ref: AdapterRef) -> None:
        assert self._is_held()
        packed = self._kept.pop(ref, None)
        if packed is not None:
            self.used_bytes -= packed.size_bytes

    def check_integrity(self) -> None:
        assert self.used_bytes == sum(packed.size_bytes for packed in self._kept.values()) <= self._budget_bytes
