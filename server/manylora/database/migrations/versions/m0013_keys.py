"""Keys have a name and may end by themselves; pages of them are ranges of an index."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    op.add_column("keys", sa.Column("expires", sa.BigInteger(), nullable=True))
    op.add_column("keys", sa.Column("name", sa.Text(), nullable=False, server_default=""))
    op.create_index("ix_keys_page", "keys", ["created", "id"])
    op.create_index("ix_keys_tenant_page", "keys", ["tenant", "created", "id"])


def downgrade() -> None:
    op.drop_index("ix_keys_tenant_page", "keys")
    op.drop_index("ix_keys_page", "keys")
    op.drop_column("keys", "name")
    op.drop_column("keys", "expires")
