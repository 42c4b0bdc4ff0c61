"""What trainings took, each token once: a job that is resumed counts what it learnt before as counted."""

from typing import Any

from sqlalchemy import func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from manylora.database.tables import MICROSECONDS, TrainingUsageRow
from manylora.usage.period import DAY_S, quarter_of

__all__ = ["add_training", "tokens_of_a_day"]


def add_training(session: Session, tenant: str, adapter: str, now_us: int, tokens: int, microseconds: int) -> None:
    """Within a change to a job: what was learnt since the last one."""
    if not tokens and not microseconds:
        return
    quarter = quarter_of(now_us / MICROSECONDS)
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    insert: Any = dialect.insert(TrainingUsageRow).values(
        quarter=quarter, tenant=tenant, adapter=adapter, tokens=tokens, microseconds=microseconds
    )
    sums = {name: getattr(TrainingUsageRow, name) + insert.excluded[name] for name in ("tokens", "microseconds")}
    session.execute(insert.on_conflict_do_update(index_elements=["quarter", "tenant", "adapter"], set_=sums))


def tokens_of_a_day(session: Session, tenant: str, now_us: int) -> int:
    """What the tenant's trainings have learnt from within the last 24 hours, to a quarter of one."""
    since = quarter_of(now_us / MICROSECONDS - DAY_S)
    is_recent = (TrainingUsageRow.tenant == tenant) & (TrainingUsageRow.quarter > since)
    query = select(func.coalesce(func.sum(TrainingUsageRow.tokens), 0)).where(is_recent)
    return int(session.execute(query).scalar_one())
