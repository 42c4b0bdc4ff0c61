"""Cards of versions: `card`, the README.md that came with the files, and its length in UTF-8, `card_bytes`."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    op.add_column("versions", sa.Column("card", sa.Text(), nullable=False, server_default=""))
    op.add_column("versions", sa.Column("card_bytes", sa.BigInteger(), nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("versions", "card_bytes")
    op.drop_column("versions", "card")
