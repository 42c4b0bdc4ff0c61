"""The head's task for versions of before there was a column for it; the modules in their reports say which."""

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0021"

_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def upgrade() -> None:
    table = sa.table(
        "versions", sa.column("id", sa.Text()), sa.column("head", sa.Text()), sa.column("report", sa.JSON())
    )
    # Reports are most of a database: those that cannot tell of a head are left where they are.
    may_have = (sa.cast(table.c.report, sa.Text()).contains(f'"{task}:', autoescape=True) for task in _TASKS)
    query = sa.select(table.c.id, table.c.report).where(table.c.head == "", sa.or_(*may_have))
    connection = op.get_bind()
    for version_id, report in connection.execute(query).all():
        paths = report.get("matched") or ()
        task = next((task for task in _TASKS if any(path.startswith(f"{task}:") for path in paths)), "")
        connection.execute(sa.update(table).where(table.c.id == version_id).values(head=task))


def downgrade() -> None:
    """What the column says stays true."""
