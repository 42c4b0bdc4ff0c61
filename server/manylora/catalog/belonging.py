"""Whose store it is: a store carries the id of its registry, and a server with another registry does not touch it.

Registry and store are backed up and restored apart from each other. A new `database_url`, a lost SQLite file or a
backup of another server beside a full store would otherwise look like a registry from which everything was deleted.
"""

from typing import Final

from sqlalchemy import exists, select

from manylora.catalog.store import Store
from manylora.database.database import Database
from manylora.database.tables import AdapterRow, RegistryRow
from manylora.errors import StartupError

__all__ = ["check_may_claim", "check_owner", "check_same", "claim", "had_adapters", "owner_of", "registry_id"]

_MARK: Final = "registry"
_WAY_OUT: Final = "Put the right database back; or register the store's adapters in this one: manylora adapters rescan"


def registry_id(database: Database) -> str:
    """The id that the registry got when it was made; its backups have the same."""
    with database.read() as session:
        return session.execute(select(RegistryRow.id)).scalar_one()


def had_adapters(database: Database) -> bool:
    """Whether an adapter was ever registered, deleted ones too."""
    with database.read() as session:
        return bool(session.execute(select(exists(select(AdapterRow.id)))).scalar_one())


def owner_of(store: Store) -> str | None:
    """The id of the registry that the store belongs to; None where none has claimed it yet."""
    mark = store.read(_MARK)
    return None if mark is None else mark.decode(errors="replace").strip()


def claim(store: Store, database: Database) -> None:
    """Write this registry's id into the store, which belongs to it from now on."""
    store.write(_MARK, f"{registry_id(database)}\n".encode())


def check_owner(store: Store, database: Database) -> None:
    """Claim a store that is nobody's, and let one of this registry be. Raises StartupError for another's."""
    owner, own = owner_of(store), registry_id(database)
    if owner == own:
        return
    num_blobs = len(store.blobs()) + len(store.orphans())
    if owner is None and num_blobs and not had_adapters(database):
        raise StartupError(
            f"The store has the files of {num_blobs} adapters, and the database has never had an adapter: was another "
            f"database meant, or was it lost? Nothing was changed. {_WAY_OUT}."
        )
    if owner is not None and (num_blobs or store.is_shared):
        raise _another(owner, own, num_blobs, "" if not had_adapters(database) else " --take-over")
    claim(store, database)


def check_may_claim(store: Store, database: Database, *, take_over: bool) -> None:
    """Refuse to claim another registry's store for a registry that has adapters, unless `take_over` is said.

    Raises StartupError.
    """
    owner, own = owner_of(store), registry_id(database)
    if owner not in (None, own) and had_adapters(database) and not take_over:
        raise _another(owner or "", own, len(store.blobs()) + len(store.orphans()), " --take-over")


def check_same(store: Store, database: Database) -> None:
    """Refuse to read another registry's store, which would seem to lack every blob. Raises StartupError."""
    owner, own = owner_of(store), registry_id(database)
    if owner not in (None, own):
        raise _another(owner or "", own, len(store.blobs()) + len(store.orphans()), "")


def _another(owner: str, own: str, num_blobs: int, flags: str) -> StartupError:
    return StartupError(
        f"The store belongs to another registry ({owner[:64]}) than this database ({own}), and has the files of "
        f"{num_blobs} adapters. Nothing was changed. {_WAY_OUT}{flags}."
    )
