"""Adapters and versions as JSON."""

from collections.abc import Callable
from typing import Any

from manylora.catalog.records import MICROSECONDS, AdapterRecord, VersionRecord
from manylora.engine.interface import AdapterRef, Tier

__all__ = ["adapter_view", "version_view"]

# A version made for a base of other shapes than the one that runs; it comes back with that base.
OTHER_BASE = "other_base"


def version_view(adapter: AdapterRecord, version: VersionRecord, tier: Tier) -> dict[str, Any]:
    """`adapter.version`, as the API documents it."""
    is_active = version.ref.version == adapter.active_version
    return {
        "id": version.ref.id,
        "object": "adapter.version",
        "name": version.ref.name,
        "version": version.ref.version,
        "digest": version.ref.digest,
        "status": "ready" if version.is_ready else OTHER_BASE,
        "active": is_active,
        "pinned": adapter.pinned and is_active,
        "tenant": version.ref.tenant,
        "kind": version.kind,
        "rank": version.rank,
        "alpha": version.alpha,
        "target_modules": list(version.target_modules),
        "size_bytes": version.size_bytes,
        "created": version.created // MICROSECONDS,
        "tier": tier,
        "report": dict(version.report),
    }


def adapter_view(adapter: AdapterRecord, tier_of: Callable[[AdapterRef], Tier]) -> dict[str, Any]:
    """`adapter`: a name with what its active version is; the facts of it are null where none is active."""
    active = adapter.active
    return {
        "id": adapter.id,
        "object": "adapter",
        "name": adapter.name,
        "tenant": adapter.tenant,
        "description": adapter.description,
        "active_version": adapter.active_version,
        "newest_version": adapter.versions[-1].ref.version,
        "num_versions": len(adapter.versions),
        "pinned": adapter.pinned,
        "created": adapter.created // MICROSECONDS,
        "digest": active.ref.digest if active else None,
        "rank": active.rank if active else None,
        "size_bytes": sum(v.size_bytes for v in adapter.versions),
        "tier": tier_of(active.ref) if active else None,
    }
