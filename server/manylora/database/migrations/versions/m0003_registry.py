"""The registry gets an id, by which a store knows whose it is."""

import hashlib
import secrets

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    registry = op.create_table("registry", sa.Column("id", sa.Text(), primary_key=True))
    op.bulk_insert(registry, [{"id": _id()}])


def _id() -> str:
    """Random for a new registry; for one that was used before, the same for all its backups: from its first upload."""
    first = op.get_bind().execute(sa.text("SELECT tenant, adapter, at FROM stored ORDER BY id LIMIT 1")).first()
    if first is None:
        return f"registry_{secrets.token_hex(12)}"
    return f"registry_{hashlib.sha256(repr(tuple(first)).encode()).hexdigest()[:24]}"


def downgrade() -> None:
    op.drop_table("registry")
