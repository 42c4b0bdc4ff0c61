"""First schema: adapters, versions, folders, keys, tenants, revisions."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    _create_adapters()
    _create_keys_and_tenants()
    revisions = op.create_table(
        "revisions",
        sa.Column("topic", sa.Text(), primary_key=True),
        sa.Column("value", sa.BigInteger(), nullable=False),
    )
    op.bulk_insert(revisions, [{"topic": "catalog", "value": 1}, {"topic": "tenants", "value": 1}])


def _create_adapters() -> None:
    op.create_table(
        "adapters",
        sa.Column("id", sa.Text(), primary_key=True),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("active_version", sa.BigInteger(), nullable=True),
        sa.Column("next_version", sa.BigInteger(), nullable=False),
        sa.Column("pinned", sa.Boolean(), nullable=False),
        sa.Column("is_deleted", sa.Boolean(), nullable=False),
        sa.Column("created", sa.BigInteger(), nullable=False),
        sa.UniqueConstraint("tenant", "name", name="uq_adapters_tenant_name"),
    )
    op.create_index("ix_adapters_tenant_page", "adapters", ["tenant", "is_deleted", "created", "id"])
    op.create_index("ix_adapters_page", "adapters", ["is_deleted", "created", "id"])
    op.create_table(
        "versions",
        sa.Column("id", sa.Text(), primary_key=True),
        sa.Column("adapter_id", sa.Text(), sa.ForeignKey("adapters.id"), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("blob", sa.Text(), nullable=False),
        sa.Column("base", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("rank", sa.BigInteger(), nullable=False),
        sa.Column("alpha", sa.Float(), nullable=False),
        sa.Column("target_modules", sa.JSON(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("report", sa.JSON(), nullable=False),
        sa.Column("created", sa.BigInteger(), nullable=False),
        sa.UniqueConstraint("adapter_id", "version", name="uq_versions_adapter_version"),
    )
    op.create_index("ix_versions_blob", "versions", ["blob"])
    op.create_table(
        "folders",
        sa.Column("path", sa.Text(), primary_key=True),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("version_id", sa.Text(), nullable=False),
    )


def _create_keys_and_tenants() -> None:
    op.create_table(
        "keys",
        sa.Column("id", sa.Text(), primary_key=True),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("prefix", sa.Text(), nullable=False),
        sa.Column("secret_hash", sa.Text(), nullable=False),
        sa.Column("created", sa.BigInteger(), nullable=False),
        sa.Column("last_used", sa.BigInteger(), nullable=True),
        sa.Column("revoked", sa.BigInteger(), nullable=True),
        sa.UniqueConstraint("prefix", name="uq_keys_prefix"),
    )
    op.create_table(
        "tenants",
        sa.Column("name", sa.Text(), primary_key=True),
        sa.Column("weight", sa.Float(), nullable=False),
        sa.Column("requests_per_minute", sa.BigInteger(), nullable=True),
        sa.Column("tokens_per_minute", sa.BigInteger(), nullable=True),
        sa.Column("max_concurrent", sa.BigInteger(), nullable=True),
        sa.Column("max_adapters", sa.BigInteger(), nullable=True),
        sa.Column("max_adapter_bytes", sa.BigInteger(), nullable=True),
        sa.Column("max_pinned", sa.BigInteger(), nullable=True),
    )


def downgrade() -> None:
    for table in ("revisions", "tenants", "keys", "folders", "versions", "adapters"):
        op.drop_table(table)
