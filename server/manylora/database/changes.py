"""The log of changes: one row for each, added in the transaction that makes it."""

import time
from collections.abc import Sequence
from typing import Final

from sqlalchemy.orm import Session

from manylora.database.tables import ChangeRow
from manylora.identity import Author

__all__ = ["ADAPTER_CHANGE", "add_change"]

ADAPTER_CHANGE: Final = "adapter"  # the kind of changes to adapters


def add_change(
    session: Session,
    author: Author,
    kind: str,
    tenant: str,
    name: str,
    action: str,
    *,
    version: int | None = None,
    switch: tuple[int | None, int | None] = (None, None),
    before: int | None = None,
    fields: Sequence[str] = (),
) -> None:
    """Add one to what is of `tenant` and called `name`; see `ChangeRow`. `switch`: what was active before, and now."""
    session.add(
        ChangeRow(
            at=time.time_ns() // 1000,
            kind=kind,
            tenant=tenant,
            name=name,
            action=action,
            version=version,
            from_version=switch[0],
            to_version=switch[1],
            before=before,
            fields=list(fields),
            by_tenant=author.tenant,
            by_role=author.role,
            by_key=author.key_id,
            note=author.note,
        )
    )
