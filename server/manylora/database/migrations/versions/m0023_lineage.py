"""How a version was made, from its card: `lineage`. Cards of before say nothing that could be read."""

import sqlalchemy as sa
from alembic import op

revision = "0023"
down_revision = "0022"


def upgrade() -> None:
    op.add_column("versions", sa.Column("lineage", sa.Text(), nullable=False, server_default=""))


def downgrade() -> None:
    op.drop_column("versions", "lineage")
