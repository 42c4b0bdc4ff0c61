"""What of a version's vocabulary is not the base's: `vocabulary`, as JSON."""

import sqlalchemy as sa
from alembic import op

revision = "0024"
down_revision = "0023"


def upgrade() -> None:
    op.add_column("versions", sa.Column("vocabulary", sa.Text(), nullable=False, server_default=""))


def downgrade() -> None:
    op.drop_column("versions", "vocabulary")
