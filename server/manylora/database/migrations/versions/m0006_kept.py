"""What a tenant keeps is counted with each change, so that its quotas cost no sum over all its adapters."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
_COUNTED = ("counted_adapters", "counted_pins", "counted_bytes")


def upgrade() -> None:
    for name in _COUNTED:
        op.add_column("adapters", sa.Column(name, sa.BigInteger(), nullable=False, server_default="0"))
    op.create_table(
        "kept",
        sa.Column("tenant", sa.Text(), primary_key=True),
        sa.Column("adapters", sa.BigInteger(), nullable=False),
        sa.Column("pinned", sa.BigInteger(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
    )
    op.execute(
        "UPDATE adapters SET counted_adapters = CASE WHEN is_deleted THEN 0 ELSE 1 END, "
        "counted_pins = CASE WHEN pinned THEN 1 ELSE 0 END, "
        "counted_bytes = COALESCE((SELECT SUM(v.size_bytes) FROM versions v WHERE v.adapter_id = adapters.id), 0)"
    )
    op.execute(
        "INSERT INTO kept (tenant, adapters, pinned, size_bytes) "
        "SELECT tenant, SUM(counted_adapters), SUM(counted_pins), SUM(counted_bytes) FROM adapters GROUP BY tenant"
    )


def downgrade() -> None:
    op.drop_table("kept")
    for name in _COUNTED:
        op.drop_column("adapters", name)
