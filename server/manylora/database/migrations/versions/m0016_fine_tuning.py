"""Files of data, fine-tuning jobs, what is told of them, and who runs them; a tenant's limits on these."""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"

_LIMITS = ("max_file_bytes", "max_jobs_queued", "max_jobs_running")


def upgrade() -> None:
    op.create_table(
        "files",
        *(_text(name) for name in ("id", "tenant", "filename", "purpose", "sha256")),
        _number("size_bytes"),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.Column("is_whole", sa.Boolean(), nullable=False),
        _number("created"),
        _number("expires", nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_files_page", "files", ["tenant", "created", "id"])
    op.create_index("ix_files_expires", "files", ["expires"])
    op.create_table(
        "jobs",
        *(_text(name) for name in ("id", "tenant", "status", "base", "training_file", "checkpoint")),
        *(_text(name, nullable=True) for name in ("validation_file", "worker")),
        *(sa.Column(name, sa.JSON(), nullable=False) for name in ("request", "author", "result", "error")),
        *(_number(name) for name in ("created", "lease_until", "run", "num_lost", "step")),
        *(_number(name, nullable=True) for name in ("started", "finished", "estimated_finish")),
        sa.Column("cost", sa.Float(), nullable=False),
        *(sa.Column(name, sa.Float(), nullable=True) for name in ("turn_from", "turn_to")),
        *(sa.Column(name, sa.Boolean(), nullable=False) for name in ("wants_pause", "has_remains")),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_jobs_page", "jobs", ["tenant", "created", "id"])
    op.create_index("ix_jobs_status", "jobs", ["status", "base"])
    op.create_index("ix_jobs_turns", "jobs", ["tenant", "turn_to"])
    op.create_index("ix_jobs_turn", "jobs", ["turn_from"])
    op.create_table(
        "job_events",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
        *(_text(name) for name in ("job", "level", "type", "message")),
        _number("created"),
        sa.Column("data", sa.JSON(), nullable=False),
    )
    op.create_index("ix_job_events_job", "job_events", ["job", "seq"])
    op.create_table(
        "workers",
        _text("id"),
        _text("base"),
        _number("last_seen"),
        sa.PrimaryKeyConstraint("id"),
    )
    for name in _LIMITS:
        op.add_column("tenants", _number(name, nullable=True))


def downgrade() -> None:
    for name in _LIMITS:
        op.drop_column("tenants", name)
    for table in ("workers", "job_events", "jobs", "files"):
        op.drop_table(table)


def _text(name: str, *, nullable: bool = False) -> "sa.Column[str]":
    return sa.Column(name, sa.Text(), nullable=nullable)


def _number(name: str, *, nullable: bool = False) -> "sa.Column[int]":
    return sa.Column(name, sa.BigInteger(), nullable=nullable)
