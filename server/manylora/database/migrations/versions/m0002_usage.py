"""Usage: requests and tokens, time in device slots, bytes stored."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "usage",
        sa.Column("quarter", sa.BigInteger(), primary_key=True, autoincrement=False),
        *(sa.Column(name, sa.Text(), primary_key=True) for name in ("tenant", "owner", "adapter", "outcome")),
        *(
            sa.Column(name, sa.BigInteger(), nullable=False)
            for name in ("requests", "prompt_tokens", "completion_tokens", "cached_tokens")
        ),
    )
    op.create_table(
        "slot_time",
        sa.Column("quarter", sa.BigInteger(), primary_key=True, autoincrement=False),
        sa.Column("tenant", sa.Text(), primary_key=True),
        sa.Column("adapter", sa.Text(), primary_key=True),
        sa.Column("microseconds", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "usage_writers",
        sa.Column("id", sa.Text(), primary_key=True),
        sa.Column("batch", sa.BigInteger(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
    )
    stored = op.create_table(
        "stored",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("adapter", sa.Text(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
    )
    op.create_index("ix_stored_adapter", "stored", ["tenant", "adapter", "id"])
    _store_what_is_there(stored)


def _store_what_is_there(stored: sa.Table) -> None:
    """Note the stored bytes of each version that exists, from when it was made. Deleted versions are not known."""
    query = sa.text(
        "SELECT a.tenant, a.name, v.created, v.size_bytes FROM versions v JOIN adapters a ON a.id = v.adapter_id "
        "ORDER BY v.created, v.version"
    )
    sizes: dict[tuple[str, str], int] = {}
    rows = []
    for tenant, name, created, size_bytes in op.get_bind().execute(query):
        sizes[tenant, name] = sizes.get((tenant, name), 0) + size_bytes
        rows.append({"tenant": tenant, "adapter": name, "at": created, "size_bytes": sizes[tenant, name]})
    if rows:
        op.bulk_insert(stored, rows)


def downgrade() -> None:
    for table in ("stored", "usage_writers", "slot_time", "usage"):
        op.drop_table(table)
