"""Quotas of several servers: what is left in each tenant's buckets, and how many of its places each server holds."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    # Written with many requests and worth nothing after a crash: all buckets are full again within a minute.
    kind = ["UNLOGGED"] if op.get_bind().dialect.name == "postgresql" else []
    op.create_table(
        "buckets",
        sa.Column("tenant", sa.Text(), primary_key=True),
        sa.Column("kind", sa.Text(), primary_key=True),
        sa.Column("level", sa.Float(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        prefixes=kind,
    )
    op.create_table(
        "seats",
        sa.Column("tenant", sa.Text(), primary_key=True),
        sa.Column("replica", sa.Text(), primary_key=True),
        sa.Column("held", sa.BigInteger(), nullable=False),
        prefixes=kind,
    )


def downgrade() -> None:
    op.drop_table("seats")
    op.drop_table("buckets")
