"""Comparing what is stored with what was stored, for every version, and mending it from a copy."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from manylora.catalog.base_signature import BaseSignature
from manylora.catalog.belonging import check_same
from manylora.catalog.copies import Copies
from manylora.catalog.registry import Registry
from manylora.catalog.store import Store
from manylora.database.database import Database

__all__ = ["Checked", "verify"]


@dataclass(frozen=True, slots=True)
class Checked:
    """One blob of the registry. `labels` are the versions that it serves; `fault` is None where it is sound."""

    blob: str
    labels: tuple[str, ...]
    fault: str | None
    is_mended: bool = False


def verify(database: Database, store: Store, repair_from: Path | None = None) -> Iterator[Checked]:
    """Every blob that the database knows, one after the other, each read to its end.

    `repair_from` is searched for folders with the lost bytes: another store or its backup, or any adapters' folders.
    Harmless beside a running server. Raises StartupError where the store is another registry's.
    """
    check_same(store, database)
    named: dict[str, list[str]] = {}
    for entry in Registry(database, BaseSignature("")).directory.entries():
        for version in entry.versions.values():
            if version.mix:
                continue
            named.setdefault(version.blob, []).append(f"{entry.tenant}/{version.ref.label}")
    copies = None if repair_from is None else Copies(repair_from)
    for blob, labels in sorted(named.items(), key=lambda item: item[1]):
        fault = store.fault(blob)
        if fault is not None and store.fault(blob, is_orphan=True) is None and store.bring_back(blob):
            yield Checked(blob, tuple(labels), fault, is_mended=True)
            continue
        copy = None if fault is None or copies is None else copies.find(blob)
        if copy is not None:
            store.put(copy, blob)
        yield Checked(blob, tuple(labels), fault, is_mended=copy is not None)
