"""Versions that were deleted and whose files are still there: in rows, so that every server knows of them."""

from sqlalchemy import delete, select

from manylora.database.database import Database
from manylora.database.tables import MICROSECONDS, RetiredRow

__all__ = ["RetiredVersions"]


class RetiredVersions:
    """The registry writes a row with each deletion; this reads them and takes them away. Methods block."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def let_go(self, revision: int, before: float) -> list[tuple[str, str]]:
        """Blob and id of each one deleted up to this revision, or before a time in Unix seconds; oldest first."""
        r = RetiredRow
        query = select(r.blob, r.version_id).where((r.revision <= revision) | (r.at < before * MICROSECONDS))
        with self._database.read() as session:
            found = session.execute(query.order_by(r.revision, r.version_id))
            return [(blob, version_id) for blob, version_id in found]

    def has(self, version_id: str) -> bool:
        with self._database.read() as session:
            return session.get(RetiredRow, version_id) is not None

    def blobs(self) -> set[str]:
        with self._database.read(is_long=True) as session:
            return set(session.execute(select(RetiredRow.blob).distinct()).scalars())

    def forget(self, version_id: str) -> None:
        """Note that a version's files are gone."""
        with self._database.write(None) as session:
            session.execute(delete(RetiredRow).where(RetiredRow.version_id == version_id))

    def forget_older(self, before: float) -> None:
        """Forget versions that were deleted before a time in Unix seconds: nobody removes their files any more."""
        with self._database.write(None) as session:
            session.execute(delete(RetiredRow).where(RetiredRow.at < before * MICROSECONDS))
