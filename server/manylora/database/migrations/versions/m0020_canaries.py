"""Versions that are tried on a share of an adapter's requests, and what these came to."""

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"

_SUMS = ("requests", "prompt_tokens", "completion_tokens", "cached_tokens", "first_tokens", "ttft_us")


def upgrade() -> None:
    op.add_column("adapters", sa.Column("canary", sa.Text(), nullable=False, server_default=""))
    op.create_table(
        "canaries",
        sa.Column("id", sa.Text(), primary_key=True),
        sa.Column("adapter_id", sa.Text(), sa.ForeignKey("adapters.id"), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in ("version", "beside", "created")),
        sa.Column("share", sa.Float(), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=True) for name in ("until", "ended")),
        sa.Column("reason", sa.Text(), nullable=False),
    )
    op.create_index("ix_canaries_adapter", "canaries", ["adapter_id", "created"])
    op.create_index("ix_canaries_ended", "canaries", ["ended"])
    op.create_table(
        "canary_counts",
        sa.Column("canary", sa.Text(), primary_key=True),
        sa.Column("version", sa.BigInteger(), primary_key=True, autoincrement=False),
        sa.Column("outcome", sa.Text(), primary_key=True),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in _SUMS),
    )


def downgrade() -> None:
    op.drop_table("canary_counts")
    op.drop_table("canaries")
    op.drop_column("adapters", "canary")
