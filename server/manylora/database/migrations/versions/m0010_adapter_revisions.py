"""Adapters carry the number of the change that wrote them, so that a server reads what is new and not all."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.add_column("adapters", sa.Column("revision", sa.BigInteger(), nullable=False, server_default="0"))
    op.create_index("ix_adapters_revision", "adapters", ["revision"])
    op.add_column("revisions", sa.Column("noted", sa.BigInteger(), nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("revisions", "noted")
    op.drop_index("ix_adapters_revision", "adapters")
    op.drop_column("adapters", "revision")
