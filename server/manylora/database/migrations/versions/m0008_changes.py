"""Who changed what, and when: a row for each change, beginning with the versions that are active now."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.create_table(
        "changes",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=True),
        sa.Column("from_version", sa.BigInteger(), nullable=True),
        sa.Column("to_version", sa.BigInteger(), nullable=True),
        sa.Column("before", sa.BigInteger(), nullable=True),
        sa.Column("fields", sa.JSON(), nullable=False),
        sa.Column("by_tenant", sa.Text(), nullable=True),
        sa.Column("by_role", sa.Text(), nullable=False),
        sa.Column("by_key", sa.Text(), nullable=True),
        sa.Column("note", sa.Text(), nullable=False),
    )
    op.create_index("ix_changes_subject", "changes", ["kind", "tenant", "name", "id"])
    op.create_index("ix_changes_tenant", "changes", ["tenant", "id"])
    # What was active before is not known, so `at` is when the version was made.
    op.execute(
        "INSERT INTO changes (at, kind, tenant, name, action, version, to_version, fields, by_role, note) "
        "SELECT v.created, 'adapter', a.tenant, a.name, 'begin', v.version, v.version, '[]', 'server', '' "
        "FROM adapters a JOIN versions v ON v.adapter_id = a.id AND v.version = a.active_version "
        "WHERE NOT a.is_deleted ORDER BY v.created, a.id"
    )


def downgrade() -> None:
    op.drop_table("changes")
