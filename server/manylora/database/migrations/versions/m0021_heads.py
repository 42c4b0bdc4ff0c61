"""For which of PEFT's tasks a version has a head."""

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"


def upgrade() -> None:
    op.add_column("versions", sa.Column("head", sa.Text(), nullable=False, server_default=""))


def downgrade() -> None:
    op.drop_column("versions", "head")
