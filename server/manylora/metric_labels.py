"""Which names have a label of their own in `/metrics`: a bounded number, and those that are busy."""

from collections.abc import Hashable
from typing import Final

__all__ = ["BASE_LABEL", "OTHER_LABEL", "BusiestNames", "Labels"]

BASE_LABEL: Final = "__base__"
OTHER_LABEL: Final = "__other__"


class BusiestNames:
    """Decides which names get a label of their own, so that the number of time series stays bounded.

    The first `free` names to appear get one. After that, a name gets one of the `reserve` labels once it has
    certainly been seen more often than the least busy name that has a label. The counts of names without a
    label are kept in a space-saving sketch (Metwally et al., 2005) of `free + reserve` entries; an entry's
    guaranteed count is its count less what it inherited from the entry it replaced.

    A label is never taken back. So every counter only grows, sums over the labels are exact, and a name keeps
    its history; the price is that a name which was busy once keeps its place until the process ends.
    """

    def __init__(self, free: int, reserve: int) -> None:
        self.free = free
        self.reserve = reserve
        self._labelled: dict[Hashable, int] = {}
        self._sketch: dict[Hashable, list[int]] = {}  # name -> [count, inherited error]

    def __contains__(self, name: Hashable) -> bool:
        return name in self._labelled

    def __len__(self) -> int:
        return len(self._labelled)

    def see(self, name: Hashable) -> bool:
        """Count one use of `name`; True when it has a label of its own (from now on, for ever)."""
        if name in self._labelled:
            self._labelled[name] += 1
            return True
        if len(self._labelled) < self.free:
            self._labelled[name] = 1
            return True
        if len(self._labelled) >= self.free + self.reserve:
            return False
        guaranteed = self._count(name)
        if guaranteed <= min(self._labelled.values(), default=0):
            return False
        del self._sketch[name]
        self._labelled[name] = guaranteed
        return True

    def _count(self, name: Hashable) -> int:
        entry = self._sketch.get(name)
        if entry is None:
            inherited = 0
            if len(self._sketch) >= self.free + self.reserve:
                rarest = min(self._sketch, key=lambda other: self._sketch[other][0])
                inherited = self._sketch.pop(rarest)[0]
            entry = self._sketch[name] = [inherited, inherited]
        entry[0] += 1
        return entry[0] - entry[1]

    def check_integrity(self) -> None:
        assert len(self._labelled) <= self.free + self.reserve
        assert len(self._sketch) <= self.free + self.reserve
        assert not self._labelled.keys() & self._sketch.keys()
        assert all(0 <= error < count for count, error in self._sketch.values())


class Labels:
    """The labels of (tenant, adapter) pairs: each tenant's own name or `__other__`, and so for its adapters."""

    def __init__(self, free: int, reserve: int) -> None:
        self._pairs = BusiestNames(free, reserve)
        self._tenants = BusiestNames(free, reserve)

    def tenant(self, tenant: str) -> str:
        return tenant if self._tenants.see(tenant) else OTHER_LABEL

    def of(self, tenant: str, adapter: str) -> tuple[str, str]:
        label = self.tenant(tenant)
        has_label = self._pairs.see((tenant, adapter)) and label == tenant
        return label, adapter if has_label else OTHER_LABEL
