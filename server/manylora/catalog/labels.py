"""What the registry knows of a version, written beside its files, so that a store can be registered again without it.

One small file for each version: `labels/<blob>.<version id>.json`. The registry is the truth, labels are a copy for the
day when it is lost. Of what they say only defaults and card change, and when the version was made active; the label is
then written again, after the registry.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from sqlalchemy import Select, func, select
from sqlalchemy.orm import undefer

from manylora.catalog.store import Store
from manylora.database.changes import ADAPTER_CHANGE
from manylora.database.database import Database
from manylora.database.tables import AdapterRow, ChangeRow, VersionRow
from manylora.lora.format.config import TASKS

__all__ = [
    "FOLDER",
    "Label",
    "active_of",
    "all_labels",
    "file_of",
    "forget",
    "labels_of",
    "missing_labels",
    "parse_name",
]

FOLDER: Final = "labels"
_NAME: Final = re.compile(r"([0-9a-f]{64})\.(version_[0-9a-f]{24})\.json")
# Versions that are read from the database at once.
_BATCH: Final = 500


class Label(BaseModel):
    """One version with the name that it is known by. `created` is in Unix microseconds.

    So is `switched`, when it was last made the active one: 0 for never, None in a label that does not say.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    version_id: str
    blob: str
    tenant: str
    name: str
    version: int
    created: int
    digest: str
    base: str
    kind: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    size_bytes: int
    report: dict[str, Any]
    defaults: str = ""
    card: str = ""
    lineage: str = ""
    virtual_tokens: int = 0
    invocation: str = ""
    head: str = ""
    vocabulary: str = ""
    switched: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _find_head(cls, said: Any) -> Any:
        """A label of before heads were said has the head's layers among the modules of its report, `TASK:layer`."""
        report = said.get("report") if isinstance(said, dict) and not said.get("head") else None
        paths = report.get("matched") if isinstance(report, dict) else None
        if not isinstance(paths, list):
            return said
        parts = (str(path).partition(":") for path in paths)
        return {**said, "head": next((task for task, colon, _ in parts if colon and task in TASKS), "")}

    @property
    def file(self) -> str:
        return file_of(self.blob, self.version_id)

    def write_to(self, store: Store) -> None:
        """Write the label beside the blob's files. Raises StoreUnavailable or StorageFull."""
        store.write(self.file, self.model_dump_json().encode())


def file_of(blob: str, version_id: str) -> str:
    """A label's place below the store's root."""
    return f"{FOLDER}/{blob}.{version_id}.json"


def parse_name(name: str) -> tuple[str, str] | None:
    """Blob and version id of a label's file name."""
    match = _NAME.fullmatch(name)
    return None if match is None else (match[1], match[2])


def labels_of(database: Database, version_ids: Iterable[str]) -> list[Label]:
    """The labels that these versions should have; those that are not registered have none."""
    switched = _last_switch().scalar_subquery()
    query = select(VersionRow, AdapterRow.tenant, AdapterRow.name, switched).join(AdapterRow)
    query = query.options(undefer(VersionRow.card), undefer(VersionRow.vocabulary))
    with database.read() as session:
        wanted = VersionRow.id.in_(list(version_ids)) & (VersionRow.blob != "")  # a mix has nothing in the store
        rows = session.execute(query.where(wanted)).all()
        return [_label(version, tenant, name, switched or 0) for version, tenant, name, switched in rows]


def _last_switch() -> Select[int]:
    """When the version of the surrounding query was last made the active one."""
    of_version = (ChangeRow.tenant == AdapterRow.tenant) & (ChangeRow.name == AdapterRow.name)
    made_active = (ChangeRow.kind == ADAPTER_CHANGE) & (ChangeRow.to_version == VersionRow.version)
    return select(func.max(ChangeRow.at)).where(of_version & made_active).correlate(AdapterRow, VersionRow)


def _label(version: VersionRow, tenant: str, name: str, switched: int) -> Label:
    others = {"version_id", "tenant", "name", "switched"}
    facts = {field: getattr(version, field) for field in Label.model_fields if field not in others}
    return Label(version_id=version.id, tenant=tenant, name=name, switched=switched, **facts)


def active_of(labels: Sequence[Label]) -> Label | None:
    """Of one adapter's labels that of the version to make active: the last that was. None if none ever was.

    The newest of those that do not say, as none did at first, where of no other one it is known.
    """
    silent = [label for label in labels if label.switched is None]
    if silent and not any(label.switched for label in labels):
        return max(silent, key=lambda label: label.version)
    return max((label for label in labels if label.switched), key=lambda label: label.switched or 0, default=None)


def missing_labels(database: Database, store: Store) -> Iterator[Label]:
    """The labels that are not in the store yet: of versions from before there were any, or after a crash."""
    known = {parsed[1] for name in store.names(FOLDER) if (parsed := parse_name(name)) is not None}
    with database.read() as session:
        wanted = sorted(set(session.execute(select(VersionRow.id).where(VersionRow.blob != "")).scalars()) - known)
    for start in range(0, len(wanted), _BATCH):
        yield from labels_of(database, wanted[start : start + _BATCH])


def all_labels(store: Store) -> Iterator[Label]:
    """Every label in the store that can be read; one that was cut short by a crash counts as none."""
    for name in sorted(store.names(FOLDER)):
        data = store.read(f"{FOLDER}/{name}") if parse_name(name) is not None else None
        if data is None:
            continue
        try:
            label = Label.model_validate_json(data)
        except ValidationError:
            continue
        if label.file == f"{FOLDER}/{name}":
            yield label


def forget(store: Store, blobs: set[str]) -> None:
    """Delete the labels of blobs that are gone for good."""
    for name in sorted(store.names(FOLDER)):
        if (parsed := parse_name(name)) is not None and parsed[0] in blobs:
            store.erase(f"{FOLDER}/{name}")
