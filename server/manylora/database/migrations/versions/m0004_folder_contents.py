"""What was ever registered from folders, so that an old folder does not bring back what a newer one replaced."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "folder_contents",
        sa.Column("name", sa.Text(), primary_key=True),
        sa.Column("digest", sa.Text(), primary_key=True),
        sa.Column("base", sa.Text(), primary_key=True),
    )
    # Which versions came from folders was not noted; that something was registered before is right for all of them.
    op.execute(
        "INSERT INTO folder_contents (name, digest, base) SELECT DISTINCT a.name, v.digest, v.base "
        "FROM versions v JOIN adapters a ON a.id = v.adapter_id WHERE a.tenant = 'public'"
    )


def downgrade() -> None:
    op.drop_table("folder_contents")
