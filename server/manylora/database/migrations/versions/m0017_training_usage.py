"""What trainings took, for the bill; what of a job was counted, and a tenant's limit on tokens a day."""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"


def upgrade() -> None:
    op.create_table(
        "training_usage",
        sa.Column("quarter", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("adapter", sa.Text(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("microseconds", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("quarter", "tenant", "adapter"),
    )
    for name in ("planned_tokens", "tokens", "microseconds"):
        op.add_column("jobs", sa.Column(name, sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("tenants", sa.Column("training_tokens_per_day", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    op.drop_column("tenants", "training_tokens_per_day")
    for name in ("microseconds", "tokens", "planned_tokens"):
        op.drop_column("jobs", name)
    op.drop_table("training_usage")
