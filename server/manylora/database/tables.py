"""The database's tables: adapters and their versions, keys, tenants, usage, and what start-up remembers.

Times are whole microseconds since the Unix epoch, so that ordering by them is exact. The schema changes only
through `migrations/`; a test holds these classes and the migrations together.
"""

from typing import Any, ClassVar, Final

from sqlalchemy import JSON, BigInteger, Float, ForeignKey, Index, Integer, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

MICROSECONDS: Final = 1_000_000  # in a second


class Base(DeclarativeBase):
    """The one set of tables."""

    type_annotation_map: ClassVar[dict[Any, Any]] = {
        str: Text(),
        int: BigInteger(),
        float: Float(),
        dict[str, Any]: JSON(),
        list[str]: JSON(),
    }


class RegistryRow(Base):
    """One row: the registry's id, made with it. A store says by it whose it is (`catalog.belonging`)."""

    __tablename__ = "registry"

    id: Mapped[str] = mapped_column(primary_key=True)


class AdapterRow(Base):
    """One name of one tenant.

    The row outlives its versions (`is_deleted`), because `next_version` must never go back: a version number
    once seen never means another adapter.
    """

    __tablename__ = "adapters"
    __table_args__ = (
        UniqueConstraint("tenant", "name", name="uq_adapters_tenant_name"),
        Index("ix_adapters_tenant_page", "tenant", "is_deleted", "created", "id"),
        Index("ix_adapters_page", "is_deleted", "created", "id"),
        Index("ix_adapters_revision", "revision"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    name: Mapped[str]
    description: Mapped[str]
    active_version: Mapped[int | None]
    next_version: Mapped[int]
    pinned: Mapped[bool]
    is_deleted: Mapped[bool]
    created: Mapped[int]
    # What of it is in its tenant's row of `kept`.
    counted_adapters: Mapped[int] = mapped_column(server_default="0")
    counted_pins: Mapped[int] = mapped_column(server_default="0")
    counted_bytes: Mapped[int] = mapped_column(server_default="0")
    revision: Mapped[int] = mapped_column(server_default="0", default=0)
    canary: Mapped[str] = mapped_column(server_default="", default="")  # the id of the one that runs


class VersionRow(Base):
    """One immutable version.

    `digest` is the canonical content's hash, `blob` addresses the bytes in the store, `base` says which shapes of
    base model it was validated against. `virtual_tokens` are the positions that it takes before each prompt,
    `invocation` the token ids, with spaces between them, from which on it acts, `head` the task that it has a head for,
    empty for none, and `vocabulary` what of its vocabulary is not the base's (`identity.Vocabulary`). A saved mix has a
    `mix` (`catalog.saved_mix`) and no `blob`. `card` is the README.md that came last with it, `lineage` what it says
    of how the version was made (`catalog.card.lineage_in`). `size_bytes` are those of the files and of `vocabulary`.
    """

    __tablename__ = "versions"
    __table_args__ = (
        UniqueConstraint("adapter_id", "version", name="uq_versions_adapter_version"),
        Index("ix_versions_blob", "blob"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"))
    version: Mapped[int]
    digest: Mapped[str]
    blob: Mapped[str]
    base: Mapped[str]
    kind: Mapped[str]
    rank: Mapped[int]
    alpha: Mapped[float]
    target_modules: Mapped[list[str]]
    size_bytes: Mapped[int]
    report: Mapped[dict[str, Any]]
    created: Mapped[int]
    defaults: Mapped[str] = mapped_column(server_default="", default="")
    virtual_tokens: Mapped[int] = mapped_column(server_default="0", default=0)
    invocation: Mapped[str] = mapped_column(server_default="", default="")
    head: Mapped[str] = mapped_column(server_default="", default="")
    mix: Mapped[str] = mapped_column(server_default="", default="")
    # Read when somebody asks for them, and not with the row.
    vocabulary: Mapped[str] = mapped_column(server_default="", default="", deferred=True)
    card: Mapped[str] = mapped_column(server_default="", default="", deferred=True)
    card_bytes: Mapped[int] = mapped_column(server_default="0", default=0)
    lineage: Mapped[str] = mapped_column(server_default="", default="")


class ChangeRow(Base):
    """One change to something of a tenant's, such as an adapter: written in the transaction that makes it, and kept.

    `from_version` and `to_version` are set where it made another version active, and `before` is then the change that a
    rollback goes back to: the one that made the earlier version active. `by_tenant` NULL is the server itself.
    """

    __tablename__ = "changes"
    __table_args__ = (
        Index("ix_changes_subject", "kind", "tenant", "name", "id"),
        Index("ix_changes_tenant", "tenant", "id"),
    )

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    at: Mapped[int]
    kind: Mapped[str]
    tenant: Mapped[str]
    name: Mapped[str]
    action: Mapped[str]
    version: Mapped[int | None]
    from_version: Mapped[int | None]
    to_version: Mapped[int | None]
    before: Mapped[int | None]
    fields: Mapped[list[str]]
    by_tenant: Mapped[str | None]
    by_role: Mapped[str]
    by_key: Mapped[str | None]
    note: Mapped[str]


class CanaryRow(Base):
    """A version that a share of an adapter's requests is answered by, beside the version that is active meanwhile.

    It runs while the adapter's row names it. `until` and `ended` are Unix microseconds, `reason` why it has ended.
    """

    __tablename__ = "canaries"
    __table_args__ = (
        Index("ix_canaries_adapter", "adapter_id", "created"),
        Index("ix_canaries_ended", "ended"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"))
    version: Mapped[int]
    beside: Mapped[int]
    share: Mapped[float]
    until: Mapped[int | None]
    created: Mapped[int]
    ended: Mapped[int | None]
    reason: Mapped[str]


class CanaryCountRow(Base):
    """Requests for the bare name while a canary ran, by the version that answered and how they ended.

    `first_tokens` of them came to one, `ttft_us` after their arrivals, added up.
    """

    __tablename__ = "canary_counts"

    canary: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    outcome: Mapped[str] = mapped_column(primary_key=True)
    requests: Mapped[int]
    prompt_tokens: Mapped[int]
    completion_tokens: Mapped[int]
    cached_tokens: Mapped[int]
    first_tokens: Mapped[int]
    ttft_us: Mapped[int]


class KeptRow(Base):
    """What a tenant keeps now, for its quotas. Written with each change to one of its adapters."""

    __tablename__ = "kept"

    tenant: Mapped[str] = mapped_column(primary_key=True)
    adapters: Mapped[int]
    pinned: Mapped[int]
    size_bytes: Mapped[int]


class FolderRow(Base):
    """What `--adapters` registered from a folder, so that an unchanged one costs a `stat` at the next start."""

    __tablename__ = "folders"

    path: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[str]
    version_id: Mapped[str]


class FolderContentRow(Base):
    """A content that `--adapters` has registered under a name, for a base; the version may be gone since."""

    __tablename__ = "folder_contents"

    name: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(primary_key=True)
    base: Mapped[str] = mapped_column(primary_key=True)


class KeyRow(Base):
    """An API key. `secret_hash` is the only trace of the secret."""

    __tablename__ = "keys"
    __table_args__ = (
        UniqueConstraint("prefix", name="uq_keys_prefix"),
        Index("ix_keys_revision", "revision"),
        Index("ix_keys_page", "created", "id"),
        Index("ix_keys_tenant_page", "tenant", "created", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    role: Mapped[str]
    prefix: Mapped[str]
    secret_hash: Mapped[str]
    created: Mapped[int]
    last_used: Mapped[int | None]
    revoked: Mapped[int | None]
    expires: Mapped[int | None]
    name: Mapped[str] = mapped_column(server_default="", default="")
    revision: Mapped[int] = mapped_column(server_default="0")


class TenantRow(Base):
    """A tenant's fair share and quotas; NULL is "no limit". A tenant without a row has the defaults."""

    __tablename__ = "tenants"
    __table_args__ = (Index("ix_tenants_revision", "revision"),)

    name: Mapped[str] = mapped_column(primary_key=True)
    weight: Mapped[float]
    requests_per_minute: Mapped[int | None]
    tokens_per_minute: Mapped[int | None]
    max_concurrent: Mapped[int | None]
    max_adapters: Mapped[int | None]
    max_adapter_bytes: Mapped[int | None]
    max_pinned: Mapped[int | None]
    max_file_bytes: Mapped[int | None]
    max_jobs_queued: Mapped[int | None]
    max_jobs_running: Mapped[int | None]
    training_tokens_per_day: Mapped[int | None]
    revision: Mapped[int] = mapped_column(server_default="0")


class RevisionRow(Base):
    """A counter per topic (`catalog`, `tenants`), raised by each writing transaction.

    Other processes read it to notice changes; the row's lock also puts writers in one order. Adapters, keys and tenants
    carry the value at which they were written last, so that only these are read again. `noted` is raised with it by
    whoever leaves that trace: where the two grow apart, an older version wrote, or a hand, and all is to be read.
    """

    __tablename__ = "revisions"

    topic: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[int]
    noted: Mapped[int] = mapped_column(server_default="0", default=0)


class ReplicaRow(Base):
    """One server of this database, which says every few seconds that it is there (`database.replicas`).

    It holds no version that was deleted up to the catalog's revision `let_go`.
    """

    __tablename__ = "replicas"

    id: Mapped[str] = mapped_column(primary_key=True)
    base: Mapped[str]
    last_seen: Mapped[int]
    let_go: Mapped[int]


class BucketRow(Base):
    """What was left of one of a tenant's quotas at a time; for all servers (`tenants.buckets`). Not kept in a crash."""

    __tablename__ = "buckets"

    tenant: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    level: Mapped[float]
    at: Mapped[int]


class SeatRow(Base):
    """How many of the requests that a tenant may have under way at once are one server's to give. As above."""

    __tablename__ = "seats"

    tenant: Mapped[str] = mapped_column(primary_key=True)
    replica: Mapped[str] = mapped_column(primary_key=True)
    held: Mapped[int]


class RetiredRow(Base):
    """A version that was deleted, at a time and with a revision of the catalog, and whose files are still there."""

    __tablename__ = "retired"
    __table_args__ = (Index("ix_retired_blob", "blob"),)

    version_id: Mapped[str] = mapped_column(primary_key=True)
    blob: Mapped[str]
    revision: Mapped[int]
    at: Mapped[int]


class UsageRow(Base):
    """Requests of one tenant for one adapter that ended within one quarter of an hour in one way.

    `quarter` is its beginning in Unix seconds, `owner` whose the adapter is; both names are empty for the base.
    """

    __tablename__ = "usage"

    quarter: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    tenant: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(primary_key=True)
    adapter: Mapped[str] = mapped_column(primary_key=True)
    outcome: Mapped[str] = mapped_column(primary_key=True)
    requests: Mapped[int]
    prompt_tokens: Mapped[int]
    completion_tokens: Mapped[int]
    cached_tokens: Mapped[int]


class TrainingUsageRow(Base):
    """What trainings of one tenant's adapter learnt from and took within one quarter of an hour."""

    __tablename__ = "training_usage"

    quarter: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    tenant: Mapped[str] = mapped_column(primary_key=True)
    adapter: Mapped[str] = mapped_column(primary_key=True)
    tokens: Mapped[int]
    microseconds: Mapped[int]


class SlotTimeRow(Base):
    """How long versions of one adapter sat in device slots within one quarter of an hour."""

    __tablename__ = "slot_time"

    quarter: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    tenant: Mapped[str] = mapped_column(primary_key=True)
    adapter: Mapped[str] = mapped_column(primary_key=True)
    microseconds: Mapped[int]


class StoredRow(Base):
    """From `at` on, one adapter's versions take `size_bytes` together. Written with each change, never changed."""

    __tablename__ = "stored"
    __table_args__ = (Index("ix_stored_adapter", "tenant", "adapter", "id"),)

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    tenant: Mapped[str]
    adapter: Mapped[str]
    at: Mapped[int]
    size_bytes: Mapped[int]


class UsageWriterRow(Base):
    """One server process that writes usage, and the last batch it wrote: a batch sent again is known by it."""

    __tablename__ = "usage_writers"

    id: Mapped[str] = mapped_column(primary_key=True)
    batch: Mapped[int]
    at: Mapped[int]


class FileRow(Base):
    """A tenant's file of data, whose bytes are in the store under its id; `expires` NULL: kept until it is deleted.

    `is_whole` is False from before its bytes are written until they are there. `facts` are what was found when its rows
    were checked: their number, their shape, and the labels of a classification.
    """

    __tablename__ = "files"
    __table_args__ = (
        Index("ix_files_page", "tenant", "created", "id"),
        Index("ix_files_expires", "expires"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    filename: Mapped[str]
    purpose: Mapped[str]
    size_bytes: Mapped[int]
    sha256: Mapped[str]
    facts: Mapped[dict[str, Any]]
    is_whole: Mapped[bool]
    created: Mapped[int]
    expires: Mapped[int | None]


class JobRow(Base):
    """One fine-tuning job, of a tenant, for the base whose signature is `base`.

    `worker` has it until `lease_until`; whatever is written for it is written on that condition. `run` counts how often
    it was taken up, `num_lost` how often whoever had it fell silent and `num_put_off` how often what it needs could not
    be had, since it last came further; what was put off is taken up after `lease_until`. `turn_from` and `turn_to` are
    its span of the tenant's virtual time, set when it is first taken up (`jobs.queue`). `wants_pause`: whoever runs it
    is to leave off. `has_remains`: the store may hold what it wrote on its way.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_page", "tenant", "created", "id"),
        Index("ix_jobs_status", "status", "base"),
        Index("ix_jobs_turns", "tenant", "turn_to"),
        Index("ix_jobs_turn", "turn_from"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    status: Mapped[str]
    base: Mapped[str]
    request: Mapped[dict[str, Any]]
    author: Mapped[dict[str, Any]]
    training_file: Mapped[str]
    validation_file: Mapped[str | None]
    cost: Mapped[float]
    created: Mapped[int]
    started: Mapped[int | None]
    finished: Mapped[int | None]
    turn_from: Mapped[float | None]
    turn_to: Mapped[float | None]
    worker: Mapped[str | None]
    lease_until: Mapped[int]
    run: Mapped[int]
    num_lost: Mapped[int]
    num_put_off: Mapped[int] = mapped_column(server_default="0", default=0)
    wants_pause: Mapped[bool]
    checkpoint: Mapped[str]
    step: Mapped[int]
    # All that it will learn from, once that is known, and what of that was counted in `training_usage`.
    planned_tokens: Mapped[int] = mapped_column(server_default="0", default=0)
    tokens: Mapped[int] = mapped_column(server_default="0", default=0)
    microseconds: Mapped[int] = mapped_column(server_default="0", default=0)
    estimated_finish: Mapped[int | None]
    result: Mapped[dict[str, Any]]
    error: Mapped[dict[str, Any]]
    has_remains: Mapped[bool]


class JobEventRow(Base):
    """What is told of a job, by `number` in the order of its telling; `seq` is everybody's, and shown to nobody."""

    __tablename__ = "job_events"
    __table_args__ = (Index("ix_job_events_number", "job", "number"),)

    seq: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    job: Mapped[str]
    number: Mapped[int]
    created: Mapped[int]
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any]]


class WorkerRow(Base):
    """One process that takes up jobs for a base, which says every few seconds that it is there."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(primary_key=True)
    base: Mapped[str]
    last_seen: Mapped[int]
