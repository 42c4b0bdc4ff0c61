"""Registering what lies in a store, for the day when the database is lost or older: from labels, else by validating.

Every step can be done again: files come back from `orphans/` one by one, then one transaction registers everything, and
only then the store belongs to this registry. A kill in between leaves files and labels where the next run finds them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import select

from manylora.catalog import labels
from manylora.catalog.base_signature import BaseSignature
from manylora.catalog.belonging import check_may_claim, claim
from manylora.catalog.labels import Label
from manylora.catalog.records import NewVersion, Published, Wish
from manylora.catalog.registry import Registry
from manylora.catalog.store import Store
from manylora.database.database import Database
from manylora.database.tables import VersionRow
from manylora.errors import InvalidAdapter, TooLarge

__all__ = ["Found", "Unnamed", "rescan"]


@dataclass(frozen=True, slots=True)
class Unnamed:
    """Whose a blob without a label is to be, and how its files are validated; `base` is of the model they fit."""

    tenant: str
    base: BaseSignature
    validate: Callable[[Path, str], NewVersion]


@dataclass(slots=True)
class Found:
    """What a rescan did. `damaged` and `refused` say why, by blob; `taken` are numbers that another version has.

    `is_claimed` says whether the store is this registry's now: not where all that it holds is left without a name.
    """

    registered: list[Label] = field(default_factory=list)
    num_known: int = 0
    taken: list[Label] = field(default_factory=list)
    nameless: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    is_claimed: bool = False


def rescan(database: Database, store: Store, unnamed: Unnamed | None = None, *, take_over: bool = False) -> Found:
    """Register every blob that the database does not know. Needs the store for itself.

    Blobs without a label get names of their own if `unnamed` says whose they are, and are only counted otherwise; a
    store of which nothing else can be said is left as it was.
    Raises StartupError where the store is another registry's, this one has adapters, and `take_over` is not said.
    """
    check_may_claim(store, database, take_over=take_over)
    found = Found()
    registry = Registry(database, BaseSignature("") if unnamed is None else unnamed.base)
    known_blobs, known_versions = registry.blobs(), _version_ids(database)
    stored, aside = set(store.blobs()), {orphan.blob for orphan in store.orphans()}
    wanted = [label for label in labels.all_labels(store) if label.version_id not in known_versions]
    sound = _sound(store, {label.blob for label in wanted} & (stored | aside), aside - stored, found)
    wanted = [label for label in wanted if label.blob in sound]
    found.registered = registry.adopt(wanted)
    found.taken = [label for label in wanted if label not in found.registered]
    found.num_known = len(known_versions)
    labelled = {label.blob for label in wanted} | found.damaged.keys()
    found.nameless = sorted((stored | aside) - known_blobs - labelled)
    if unnamed is not None:
        _register_nameless(database, store, registry, unnamed, aside - stored, found)
    found.is_claimed = bool(known_blobs & (stored | aside) or found.registered) or not found.nameless
    if found.is_claimed:
        claim(store, database)
    return found


def _version_ids(database: Database) -> set[str]:
    with database.read() as session:
        return set(session.execute(select(VersionRow.id)).scalars())


def _sound(store: Store, blobs: set[str], aside: set[str], found: Found) -> set[str]:
    """The blobs whose files have the hash that they are stored under; those in `orphans/` are brought back."""
    sound = set()
    for blob in sorted(blobs):
        fault = store.fault(blob, is_orphan=blob in aside)
        if fault is not None:
            found.damaged[blob] = fault
            continue
        if blob in aside:
            store.bring_back(blob)
        sound.add(blob)
    return sound


def _register_nameless(
    database: Database, store: Store, registry: Registry, unnamed: Unnamed, aside: set[str], found: Found
) -> None:
    for blob in _sound(store, set(found.nameless), aside, found):
        try:
            new = unnamed.validate(store.local_folder(blob), blob)
        except (InvalidAdapter, TooLarge) as error:
            found.refused[blob] = error.message
            continue
        done = registry.publish(Wish(unnamed.tenant, f"recovered-{blob[:12]}", activate=True), new)
        found.registered += _labelled(database, store, done)
        found.nameless.remove(blob)


def _labelled(database: Database, store: Store, done: Published) -> list[Label]:
    written = labels.labels_of(database, [done.version.ref.id])
    for label in written:
        label.write_to(store)
    return written
