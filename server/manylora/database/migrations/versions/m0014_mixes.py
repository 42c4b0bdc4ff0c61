"""Versions that are saved mixes: `mix`, adapters with their weights as JSON, empty for a version with files."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    op.add_column("versions", sa.Column("mix", sa.Text(), nullable=False, server_default=""))


def downgrade() -> None:
    op.drop_column("versions", "mix")
