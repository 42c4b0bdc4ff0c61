"""What a version says of the requests that name it: `defaults`, a JSON object as text, empty for none."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("versions", sa.Column("defaults", sa.Text(), nullable=False, server_default=""))


def downgrade() -> None:
    op.drop_column("versions", "defaults")
