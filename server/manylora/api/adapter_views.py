"""Adapters and versions as JSON."""

from collections.abc import Callable
from typing import Any

from manylora.catalog.records import AdapterRecord, VersionRecord
from manylora.engine.interface import AdapterRef, Tier

__all__ = ["adapter_view", "version_view"]

# A version made for a base of other shapes than the one that runs; it comes back with that base.
OTHER_BASE = "other_base"


def version_view(
    adapter: AdapterRecord, version: VersionRecord, tier: Tier, *, has_other_name: bool = False
) -> dict[str, Any]:
    """`adapter.version`, as the API documents it. `has_other_name`: it names another model than the served one."""
    is_active = version.ref.version == adapter.active_version
    return {
        "id": version.ref.id,
        "object": "adapter.version",
        "name": version.ref.name,
        "version": version.ref.version,
        "digest": version.ref.digest,
        "status": _status(version),
        "active": is_active,
        "pinned": adapter.pinned and is_active,
        "tenant": version.ref.tenant,
        "kind": version.kind,
        "rank": version.rank,
        "alpha": version.alpha,
        "target_modules": list(version.target_modules),
        "size_bytes": version.size_bytes,
        "created": version.created_s,
        "tier": tier,
        "report": {"base_model": None, **version.report, "base_model_differs": has_other_name},
    }


def _status(version: VersionRecord) -> str:
    return "ready" if version.is_ready else OTHER_BASE


def adapter_view(
    adapter: AdapterRecord,
    tier_of: Callable[[AdapterRef], Tier],
    has_other_name: Callable[[VersionRecord], bool] = lambda _: False,
) -> dict[str, Any]:
    """`adapter`: a name with what its active version is; the facts of it are null where none is active."""
    active = adapter.active
    return {
        "id": adapter.id,
        "object": "adapter",
        "name": adapter.name,
        "tenant": adapter.tenant,
        "description": adapter.description,
        "active_version": adapter.active_version,
        "status": _status(active) if active else None,
        "base_model": active.report.get("base_model") if active else None,
        "base_model_differs": active is not None and has_other_name(active),
        "newest_version": adapter.versions[-1].ref.version,
        "num_versions": len(adapter.versions),
        "pinned": adapter.pinned,
        "created": adapter.created_s,
        "digest": active.ref.digest if active else None,
        "rank": active.rank if active else None,
        "size_bytes": sum(v.size_bytes for v in adapter.versions),
        "tier": tier_of(active.ref) if active else None,
    }
