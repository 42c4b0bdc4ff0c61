"""Whose adapter a route means, and whether the caller may touch it.

What a caller may not see is answered exactly as what does not exist.
"""

import re
from typing import Final

from manylora.api.auth import has_role
from manylora.catalog.directory import Directory
from manylora.errors import AdapterNotFound, Conflict, PermissionDenied
from manylora.identity import PUBLIC_TENANT
from manylora.tenants.interface import Principal, Role
from manylora.tenants.keys import check_tenant

__all__ = ["answers_for", "not_found", "owner_of", "target_tenant", "version_number"]

_VERSION: Final = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)
_LONGEST_ECHO: Final = 80


def not_found(label: str) -> AdapterNotFound:
    """The one answer for missing and foreign. `label` is the name as the caller wrote it."""
    shown = label if len(label) <= _LONGEST_ECHO else f"{label[:_LONGEST_ECHO]}…"
    return AdapterNotFound(f"There is no adapter '{shown}'. GET /v1/adapters lists those that you may use.")


def version_number(name: str, text: str) -> int:
    """The version in a path. Raises AdapterNotFound, since no version can be called anything else."""
    if not _VERSION.fullmatch(text):
        raise not_found(f"{name}@{text}")
    return int(text)


def answers_for(caller: Principal, owner: str) -> bool:
    """Whether the caller may see what concerns only those whose adapter it is, and not all who may use it."""
    return owner == caller.tenant or has_role(caller, Role.ADMIN)


def target_tenant(caller: Principal, tenant: str | None) -> str:
    """For whom an upload is. Raises PermissionDenied where a caller who is no admin names another tenant."""
    if tenant is None or tenant == caller.tenant:
        return caller.tenant
    if not has_role(caller, Role.ADMIN):
        raise PermissionDenied("Only a key with the role 'admin' may upload for another tenant.")
    check_tenant(tenant)
    return tenant


def owner_of(
    directory: Directory,
    caller: Principal,
    name: str,
    tenant: str | None,
    *,
    version: int | None = None,
    for_change: bool = False,
) -> str:
    """The tenant whose adapter (or version of it) `name` is.

    The caller's own comes first, then that of `public`; for an admin then the only one there is. `tenant` picks
    another. Raises AdapterNotFound, Conflict (an admin has to say whose), or PermissionDenied (`for_change`, and
    the adapter is `public`'s).
    """
    label = name if version is None else f"{name}@{version}"
    is_admin = has_role(caller, Role.ADMIN)
    owners = [t for t in (caller.tenant, PUBLIC_TENANT) if directory.own(t, name) is not None]
    if tenant is not None:
        owners = [tenant] if directory.own(tenant, name) and (is_admin or tenant in owners) else []
    elif is_admin and not owners:
        owners = directory.owners_of(name)
        if len(owners) > 1:
            raise Conflict(f"Several tenants have an adapter '{name}': add ?tenant= to say whose you mean.")
    entry = directory.own(owners[0], name) if owners else None
    if entry is None or (version is not None and version not in entry.versions):
        raise not_found(label)
    if for_change and not is_admin and entry.tenant != caller.tenant:
        raise PermissionDenied(f"'{name}' belongs to everybody: only a key with the role 'admin' may change it.")
    return entry.tenant
