"""What a version does to prompts: the positions of its virtual tokens, and the tokens that invoke it."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.add_column("versions", sa.Column("virtual_tokens", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("versions", sa.Column("invocation", sa.Text(), nullable=False, server_default=""))


def downgrade() -> None:
    op.drop_column("versions", "invocation")
    op.drop_column("versions", "virtual_tokens")
