"""Deleting what was set aside, when an operator says so."""

from manylora.catalog import labels
from manylora.catalog.base_signature import BaseSignature
from manylora.catalog.belonging import check_same
from manylora.catalog.registry import Registry
from manylora.catalog.store import Store
from manylora.database.database import Database

__all__ = ["drop_orphans"]


def drop_orphans(database: Database, store: Store) -> set[str]:
    """Delete the blobs in `orphans/` for good, with their labels; gives those that were deleted.

    One that the database knows is brought back in place of that: the right database may have been put back since the
    start that set it aside. Needs the store for itself. Raises StartupError where the store is another registry's.
    """
    check_same(store, database)
    known, dropped = Registry(database, BaseSignature("")).blobs(), set[str]()
    for orphan in store.orphans():
        if orphan.blob in known:
            store.bring_back(orphan.blob)
        else:
            store.drop(orphan.blob)
            dropped.add(orphan.blob)
    labels.forget(store, dropped - store.blobs().keys())
    return dropped
