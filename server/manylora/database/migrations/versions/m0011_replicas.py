"""Servers know of each other, and a deleted version's files wait until every server has let go of it."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.create_table(
        "replicas",
        sa.Column("id", sa.Text(), primary_key=True),
        sa.Column("base", sa.Text(), nullable=False),
        sa.Column("last_seen", sa.BigInteger(), nullable=False),
        sa.Column("let_go", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "retired",
        sa.Column("version_id", sa.Text(), primary_key=True),
        sa.Column("blob", sa.Text(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
    )
    op.create_index("ix_retired_blob", "retired", ["blob"])


def downgrade() -> None:
    op.drop_table("retired")
    op.drop_table("replicas")
