"""Keys and quotas carry the number of the change that wrote them, so that a server reads what is new and not all."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
_TABLES = ("keys", "tenants")


def upgrade() -> None:
    for table in _TABLES:
        op.add_column(table, sa.Column("revision", sa.BigInteger(), nullable=False, server_default="0"))
        op.create_index(f"ix_{table}_revision", table, ["revision"])


def downgrade() -> None:
    for table in _TABLES:
        op.drop_index(f"ix_{table}_revision", table)
        op.drop_column(table, "revision")
