"""The adapters in memory, so that a request's name becomes an identity without a query."""

import heapq
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from manylora.catalog.interface import Canary, PublishedAdapter
from manylora.catalog.saved_mix import SavedPart
from manylora.database.tables import MICROSECONDS
from manylora.errors import AdapterNotFound
from manylora.identity import PUBLIC_TENANT, AdapterRef, Mix


@dataclass(frozen=True, slots=True)
class Listed:
    """One version, with the few facts that a request needs of it."""

    ref: AdapterRef
    blob: str
    created: int
    is_ready: bool
    defaults: str = ""
    rank: int = 0
    mix: tuple[SavedPart, ...] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """One adapter. Never changed, only replaced, so that a reader without a lock sees one state."""

    tenant: str
    name: str
    pinned: bool
    active_version: int | None
    versions: Mapping[int, Listed]
    canary: Canary | None = None


def missing(name: str, version: int | None = None) -> AdapterNotFound:
    """The one answer for an adapter that is missing, not ready or another tenant's."""
    label = name if version is None else f"{name}@{version}"
    return AdapterNotFound(f"There is no adapter '{label}'. GET /v1/models lists what you may use.", param="model")


class Directory:
    """Implements `catalog.interface.AdapterDirectory`.

    Written under the registry's lock only, right after each commit; read from any thread without one. A version
    that was removed stays known as retired until `release`: requests that began before may still need its files.
    """

    def __init__(self) -> None:
        self._tenants: dict[str, dict[str, Entry]] = {}
        self._names: dict[str, tuple[str, ...]] = {}  # sorted; replaced and never changed, as readers hold no lock
        self._blobs: dict[str, str] = {}  # version id -> blob
        self._retired: dict[str, tuple[str, int]] = {}  # version id -> blob, and revision: the same for removed ones

    def __len__(self) -> int:
        return sum(len(entries) for entries in self._tenants.values())

    @property
    def num_usable(self) -> int:
        """Adapters with a version that can be used. Looks at all: not for the hot path."""
        return sum(any(self._is_usable(listed) for listed in entry.versions.values()) for entry in self.entries())

    @property
    def num_other_base(self) -> int:
        """Adapters all of whose versions are for other bases. Looks at all: not for the hot path."""
        return sum(not any(listed.is_ready for listed in entry.versions.values()) for entry in self.entries())

    def resolve(self, tenant: str, name: str, version: int | None = None) -> AdapterRef:
        """The tenant's own adapter, else the public one. Raises AdapterNotFound."""
        if version is None:
            entry = self.find(tenant, name)
            listed = None if entry is None else self.active_of(entry)
        else:
            entry = self.own(tenant, name) or self.own(PUBLIC_TENANT, name)
            listed = None if entry is None else entry.versions.get(version)
        if listed is None or not self._is_usable(listed):
            raise missing(name, version)
        return listed.ref

    def active_of(self, entry: Entry) -> Listed | None:
        """The active version, if there is one that can be used."""
        listed = None if entry.active_version is None else entry.versions[entry.active_version]
        return listed if listed is not None and self._is_usable(listed) else None

    def drawn(self, ref: AdapterRef, who: str) -> tuple[AdapterRef, str]:
        """The version that answers a request for the bare name of `ref`; see `AdapterDirectory`."""
        entry = self.own(ref.tenant, ref.name)
        canary = None if entry is None else entry.canary
        if entry is None or canary is None or entry.active_version != ref.version:
            return ref, ""
        listed = entry.versions.get(canary.version)
        is_over = canary.until is not None and time.time() * MICROSECONDS >= canary.until
        if is_over or listed is None or not self._is_usable(listed):
            return ref, ""
        return listed.ref if canary.takes(who) else ref, canary.id

    def has_parts(self, mix: Sequence[SavedPart]) -> bool:
        """Whether each is still there and made for this base; so it is for the none of what is not a mix."""
        return all(self._part(part) for part in mix)

    def _is_usable(self, listed: Listed) -> bool:
        return listed.is_ready and self.has_parts(listed.mix)

    def mix_of(self, ref: AdapterRef) -> Mix:
        """What runs for a version: itself, or the versions that a saved mix has. Raises AdapterNotFound."""
        entry = self.own(ref.tenant, ref.name)
        listed = None if entry is None else entry.versions.get(ref.version)
        if listed is None or listed.ref.id != ref.id or not listed.mix:
            return Mix.of(ref)
        found = [(self._part(part), part.weight) for part in listed.mix]
        refs = [(part, weight) for part, weight in found if part is not None]
        if len(refs) < len(found):
            raise missing(ref.name, ref.version)
        return Mix.weighted(refs)

    def refs_of(self, ref: AdapterRef) -> list[AdapterRef]:
        """The version, or of a saved mix those of its adapters that are still there."""
        entry = self.own(ref.tenant, ref.name)
        listed = None if entry is None else entry.versions.get(ref.version)
        if listed is None or not listed.mix:
            return [ref]
        return [part for each in listed.mix if (part := self._part(each)) is not None]

    def _part(self, part: SavedPart) -> AdapterRef | None:
        """The version, where it is still there and made for this base."""
        entry = self.own(part.tenant, part.name)
        listed = None if entry is None else entry.versions.get(part.version)
        return listed.ref if listed is not None and listed.ref.id == part.id and listed.is_ready else None

    def defaults_of(self, ref: AdapterRef) -> str:
        """What the version says of requests, as canonical JSON; nothing for one that was removed meanwhile."""
        entry = self.own(ref.tenant, ref.name)
        listed = None if entry is None else entry.versions.get(ref.version)
        return listed.defaults if listed is not None and listed.ref.id == ref.id else ""

    def rank_of(self, ref: AdapterRef) -> int:
        """The version's highest rank; 0 for one that was removed meanwhile."""
        entry = self.own(ref.tenant, ref.name)
        listed = None if entry is None else entry.versions.get(ref.version)
        return listed.rank if listed is not None and listed.ref.id == ref.id else 0

    def visible_to(self, tenant: str, start: str = "") -> Iterator[PublishedAdapter]:
        """Own adapters and those public ones that no own adapter hides, by name, from `start` on; only active ones.

        Entries are made as they are asked for, so a short page of a long list is cheap.
        """
        owners = dict.fromkeys((tenant, PUBLIC_TENANT))
        last = None
        for name in heapq.merge(*(self._names_from(owner, start) for owner in owners)):
            entry = self.find(tenant, name) if name != last else None
            last = name
            active = None if entry is None else self.active_of(entry)
            if active is not None:
                yield PublishedAdapter(active.ref, active.created // MICROSECONDS)

    def _names_from(self, tenant: str, start: str) -> Iterator[str]:
        names = self._names.get(tenant, ())
        return (names[index] for index in range(bisect_left(names, start), len(names)))

    def find(self, tenant: str, name: str) -> Entry | None:
        """The entry that `name` means for this tenant. One whose active version is a mix without a part hides none."""
        for owner in (tenant, PUBLIC_TENANT):
            entry = self.own(owner, name)
            if entry is not None and not self._lacks_part(entry):
                return entry
        return None

    def _lacks_part(self, entry: Entry) -> bool:
        listed = None if entry.active_version is None else entry.versions[entry.active_version]
        return listed is not None and not self.has_parts(listed.mix)

    def own(self, tenant: str, name: str) -> Entry | None:
        """The tenant's adapter of that name, and nobody else's."""
        return self._tenants.get(tenant, {}).get(name)

    def owners_of(self, name: str) -> list[str]:
        """Every tenant that has an adapter of that name: for admins only."""
        return [tenant for tenant, entries in list(self._tenants.items()) if name in entries]

    def blob_of(self, version_id: str) -> str | None:
        """The blob of a version that is registered or retired; of a mix an empty text."""
        blob = self._blobs.get(version_id)
        return blob if blob is not None else self._retired.get(version_id, (None, 0))[0]

    def is_retired(self, blob: str) -> bool:
        return any(retired == blob for retired, _ in list(self._retired.values()))

    def let_go(self, seen: int) -> int:
        """The revision, at most `seen`, up to which every version that was removed has been released."""
        return min((revision - 1 for _, revision in list(self._retired.values())), default=seen)

    def release(self, version_id: str) -> None:
        """Forget a retired version: no request needs its files any more."""
        self._retired.pop(version_id, None)

    def entries(self) -> list[Entry]:
        return [entry for entries in list(self._tenants.values()) for entry in list(entries.values())]

    def put(self, entry: Entry) -> None:
        self.apply({(entry.tenant, entry.name): entry})

    def remove(self, tenant: str, name: str) -> None:
        self.apply({(tenant, name): None})

    def apply(self, changes: Mapping[tuple[str, str], Entry | None], revision: int = 0) -> list[AdapterRef]:
        """Take over what these adapters, by tenant and name, are at `revision`; the versions that are now retired."""
        gone: list[AdapterRef] = []
        renamed: dict[str, list[str]] = {}
        for (tenant, name), entry in changes.items():
            old = self.own(tenant, name)
            if entry is not None:
                self._blobs.update({v.ref.id: v.blob for v in entry.versions.values()})
                self._tenants.setdefault(tenant, {})[name] = entry
            elif old is not None:
                del self._tenants[tenant][name]
            if (old is None) != (entry is None):
                renamed.setdefault(tenant, []).append(name)
            gone += self._retire_gone(old, entry, revision)
        for tenant, names in renamed.items():
            self._names[tenant] = self._names_with(tenant, names)
        return gone

    def _names_with(self, tenant: str, changed: Sequence[str]) -> tuple[str, ...]:
        """The tenant's names, of which `changed` are new or gone. One more or less of many takes no sorting."""
        entries, names = self._tenants[tenant], self._names.get(tenant, ())
        if len(changed) > 1:
            return tuple(sorted(entries))
        (name,) = changed
        place = bisect_left(names, name)
        return (*names[:place], name, *names[place:]) if name in entries else (*names[:place], *names[place + 1 :])

    def _retire_gone(self, old: Entry | None, new: Entry | None, revision: int) -> list[AdapterRef]:
        kept = set() if new is None else {v.ref.id for v in new.versions.values()}
        gone = [listed for listed in ([] if old is None else old.versions.values()) if listed.ref.id not in kept]
        for listed in gone:
            self._retired[listed.ref.id] = listed.blob, revision
            self._blobs.pop(listed.ref.id, None)
        return [listed.ref for listed in gone]

    def replace(self, entries: Iterable[Entry], revision: int = 0) -> list[AdapterRef]:
        """Take over the database's state at `revision` whole; the versions that are gone and now retired."""
        tenants: dict[str, dict[str, Entry]] = {}
        for entry in entries:
            tenants.setdefault(entry.tenant, {})[entry.name] = entry
        before = [v for e in self.entries() for v in e.versions.values()]
        blobs = {v.ref.id: v.blob for es in tenants.values() for e in es.values() for v in e.versions.values()}
        gone = [listed for listed in before if listed.ref.id not in blobs]
        self._retired.update({listed.ref.id: (listed.blob, revision) for listed in gone})
        self._blobs = blobs
        self._tenants = tenants
        self._names = {tenant: tuple(sorted(entries)) for tenant, entries in tenants.items()}
        return [listed.ref for listed in gone]

    def check_integrity(self) -> None:
        listed = {}
        for tenant, entries in self._tenants.items():
            for name, entry in entries.items():
                assert (entry.tenant, entry.name) == (tenant, name)
                assert entry.versions, f"{name} has no version"
                assert entry.active_version is None or entry.active_version in entry.versions
                for number, version in entry.versions.items():
                    assert (version.ref.tenant, version.ref.name, version.ref.version) == (tenant, name, number)
                    listed[version.ref.id] = version.blob
        assert listed == self._blobs
        assert {t: list(n) for t, n in self._names.items() if n} == {
            t: sorted(e) for t, e in self._tenants.items() if e
        }
        assert not self._blobs.keys() & self._retired.keys()
