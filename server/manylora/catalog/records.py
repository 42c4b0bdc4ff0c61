"""What the registry hands out: frozen copies of rows, and what an upload adds."""

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol
from weakref import WeakValueDictionary

from sqlalchemy.orm import Session

from manylora.catalog.base_signature import BaseSignature
from manylora.catalog.saved_mix import SavedPart, parts_of
from manylora.database.tables import MICROSECONDS, AdapterRow, VersionRow
from manylora.identity import SERVER, AdapterRef, Author, Vocabulary

MAX_DESCRIPTION: Final = 4096  # characters
MAX_NOTE: Final = 1024  # characters


@dataclass(frozen=True, slots=True)
class Payer:
    """Who an upload is tried for: its share of the engine, by `weight`, and its usage."""

    tenant: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Wish:
    """Where an upload goes and what else it asks for; None leaves what is there.

    `activate` None makes the first version of a name the active one, and leaves a name that has versions as it is.

    `defaults` is the canonical text of what came as `manylora.json`. The same content with others is a new version.

    `card` is the text of what came as `README.md`: the version has it from then on, whether it is new or was there.
    So it has `lineage`, what the card says of how it was made (`catalog.card.lineage_in`).

    `payer` None: the operator's own, which the owner's share of the engine runs and nobody is charged for.

    `also` is done in the transaction that publishes: what it raises leaves nothing published.
    """

    tenant: str
    name: str
    description: str | None = None
    pinned: bool | None = None
    activate: bool | None = None
    payer: Payer | None = None
    defaults: str | None = None
    card: str | None = None
    lineage: str = ""
    author: Author = SERVER
    also: "Callable[[Session, Published], None] | None" = None

    @property
    def card_bytes(self) -> int:
        return len((self.card or "").encode())


@dataclass(frozen=True, slots=True)
class NewVersion:
    """A validated adapter whose files are in the store under `blob`, or a mix, about to be published.

    `former_digest`: what earlier versions of this server gave the same files, which did not look at all of them.
    """

    id: str
    digest: str
    blob: str
    kind: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    size_bytes: int
    report: Mapping[str, Any]
    virtual_tokens: int = 0
    invocation: tuple[int, ...] = ()
    head: str = ""
    mix: str = ""
    vocabulary: str = ""
    former_digest: str = ""


@dataclass(frozen=True, slots=True)
class Folder:
    """Where `--adapters` found a version, and what its files' `stat` said then."""

    path: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """One version of one adapter. `created` is in Unix microseconds.

    `ref` is without its vocabulary, which can be large: who runs the version has that from the directory.

    `is_ready` is False where the server now runs a base model of other shapes than the version was made for. Whether a
    mix has all its adapters, `Directory.has_parts` knows.
    """

    ref: AdapterRef
    blob: str
    is_ready: bool
    kind: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    size_bytes: int
    report: Mapping[str, Any]
    created: int
    defaults: str
    mix: tuple[SavedPart, ...]
    card_bytes: int
    lineage: str

    @property
    def created_s(self) -> int:
        """`created` in whole Unix seconds."""
        return self.created // MICROSECONDS


@dataclass(frozen=True, slots=True)
class VersionSums:
    """What an adapter's versions come to: how many, the newest one's number (0 where there is none), their bytes."""

    count: int = 0
    newest: int = 0
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One adapter, its active version, and what all its versions come to. `created` is in Unix microseconds."""

    id: str
    tenant: str
    name: str
    description: str
    active_version: int | None
    pinned: bool
    created: int
    active: VersionRecord | None
    sums: VersionSums

    @property
    def created_s(self) -> int:
        """`created` in whole Unix seconds."""
        return self.created // MICROSECONDS


@dataclass(frozen=True, slots=True)
class VersionPage:
    """Some of an adapter's versions, oldest first; the next page is of those before `next_before`, if there is one."""

    versions: tuple[VersionRecord, ...]
    next_before: int | None


@dataclass(frozen=True, slots=True)
class Change:
    """One change to an adapter (`kind` "adapter"), or to something else of a tenant's. `at` is in Unix microseconds.

    The versions before and after are those that were active, None and None where the change left that alone.
    """

    id: int
    at: int
    kind: str
    tenant: str
    name: str
    action: str
    version: int | None
    from_version: int | None
    to_version: int | None
    fields: tuple[str, ...]
    author: Author

    @property
    def at_s(self) -> int:
        """`at` in whole Unix seconds."""
        return self.at // MICROSECONDS


@dataclass(frozen=True, slots=True)
class ChangePage:
    """Some changes, newest first; the next page is of those before `next_before`, if there is one."""

    changes: tuple[Change, ...]
    next_before: int | None


@dataclass(frozen=True, slots=True)
class Published:
    """What `Registry.publish` did: `is_new` is False where the newest version had the digest already."""

    adapter: AdapterRecord
    version: VersionRecord
    is_new: bool


def adapter_record(row: AdapterRow, active: VersionRow | None, sums: VersionSums, base: BaseSignature) -> AdapterRecord:
    """The record as a server with this base model sees it."""
    return AdapterRecord(
        id=row.id,
        tenant=row.tenant,
        name=row.name,
        description=row.description,
        active_version=row.active_version,
        pinned=row.pinned,
        created=row.created,
        active=None if active is None else version_record(row, active, base),
        sums=sums,
    )


class _Owned(Protocol):
    """What says whose a version is."""

    tenant: Any
    name: Any


class _Versioned(Protocol):
    """What of a version is its identity."""

    id: Any
    version: Any
    digest: Any
    virtual_tokens: Any
    invocation: Any
    head: Any


# Those that somebody has, so that all versions with the same text have one object.
_VOCABULARIES: Final[WeakValueDictionary[str, Vocabulary]] = WeakValueDictionary()


def _vocabulary(text: str) -> Vocabulary | None:
    found = _VOCABULARIES.get(text)
    if found is None and (found := Vocabulary.parse(text)) is not None:
        _VOCABULARIES[text] = found
    return found


def ref_of(adapter: _Owned, row: _Versioned, vocabulary: str = "") -> AdapterRef:
    """The identity of a version, of its columns and its adapter's, with its vocabulary where that was read."""
    invocation = tuple(map(int, row.invocation.split())) if row.invocation else ()
    return AdapterRef(
        row.id,
        adapter.tenant,
        adapter.name,
        row.version,
        row.digest,
        row.virtual_tokens,
        invocation,
        row.head,
        _vocabulary(vocabulary),
    )


def version_record(adapter: AdapterRow, row: VersionRow, base: BaseSignature) -> VersionRecord:
    """One version of the adapter as a server with this base model sees it."""
    return VersionRecord(
        ref=ref_of(adapter, row),
        blob=row.blob,
        is_ready=base.fits(row.base),
        kind=row.kind,
        rank=row.rank,
        alpha=row.alpha,
        target_modules=tuple(row.target_modules),
        size_bytes=row.size_bytes,
        report=row.report,
        created=row.created,
        defaults=row.defaults,
        mix=parts_of(row.mix),
        card_bytes=row.card_bytes,
        lineage=row.lineage,
    )


def new_id(kind: str) -> str:
    """`adapter_…`, `version_…`: 96 random bits, unique for ever."""
    return f"{kind}_{secrets.token_hex(12)}"


def now_us() -> int:
    return time.time_ns() // 1000
