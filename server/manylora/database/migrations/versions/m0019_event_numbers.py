"""Events of a job are numbered by themselves."""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"

_NUMBER = """
UPDATE job_events SET number = (
    SELECT count(*) FROM job_events AS other WHERE other.job = job_events.job AND other.seq <= job_events.seq
)
"""


def upgrade() -> None:
    op.add_column("job_events", sa.Column("number", sa.BigInteger(), nullable=False, server_default="0"))
    op.execute(_NUMBER)
    op.drop_index("ix_job_events_job", "job_events")
    op.create_index("ix_job_events_number", "job_events", ["job", "number"])


def downgrade() -> None:
    op.drop_index("ix_job_events_number", "job_events")
    op.create_index("ix_job_events_job", "job_events", ["job", "seq"])
    op.drop_column("job_events", "number")
