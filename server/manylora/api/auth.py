"""Who is calling: FastAPI dependencies over the tenants' gate.

@router.post("/v1/adapters")
async def create(caller: Manager) -> ...:      # a Principal with role manager or admin, else 401 or 403
"""

import re
from collections.abc import Awaitable, Callable
from typing import Annotated, Final

from fastapi import Depends, Request

from manylora.api.state import Services, ServicesDep
from manylora.errors import AuthenticationFailed, InvalidRequest, PermissionDenied
from manylora.identity import Author
from manylora.tenants.interface import Principal, Role

__all__ = ["REVISION_HEADER", "Admin", "Caller", "Manager", "at_least", "author_of", "current_principal", "has_role"]

REVISION_HEADER: Final = "x-manylora-revision"
MAX_REVISION_DIGITS: Final = 18
_REVISION: Final = re.compile(rf"[0-9]{{1,{MAX_REVISION_DIGITS}}}", re.ASCII)
_ORDER = {role: rank for rank, role in enumerate(Role)}


def has_role(principal: Principal, role: Role) -> bool:
    """Roles are ordered; each includes the ones before it."""
    return _ORDER[principal.role] >= _ORDER[role]


def author_of(principal: Principal, note: str | None = None) -> Author:
    """The caller, as the history of what is changed names it."""
    return Author(principal.tenant, principal.role, principal.key_id, note or "")


async def current_principal(request: Request, services: ServicesDep) -> Principal:
    """The caller, from the `Authorization` or `x-api-key` header; what it has changed elsewhere is known here by then.

    Raises AuthenticationFailed or RateLimited.
    """
    if services.gate.is_open and not services.may_run_open:
        raise AuthenticationFailed(
            "This server has no API key and is reachable from other machines. "
            "Make a key with `manylora keys create`, or start it with --allow-open."
        )
    principal = services.gate.authenticate(_authorization(request))
    services.presence.enter(request.scope["manylora.visit"], principal.tenant)
    fields = request.scope.setdefault("manylora.log", {})
    fields["tenant"] = principal.tenant
    if principal.key_id is not None:
        fields["key_id"] = principal.key_id
    await _reach(request.headers.get(REVISION_HEADER), services)
    return principal


async def _reach(text: str | None, services: Services) -> None:
    """Let the caller see what a server of this database has told it that it changed.

    Raises InvalidRequest or Unavailable.
    """
    if text is None:
        return
    if not _REVISION.fullmatch(text):
        raise InvalidRequest(f"The header {REVISION_HEADER} must be a number that a change was answered with.")
    if services.following is not None:
        await services.following.reach(int(text))


def _authorization(request: Request) -> str | None:
    """`Authorization`, or where that is missing or empty the key that other APIs' clients send in `x-api-key`."""
    key = request.headers.get("x-api-key")
    given = request.headers.get("authorization")
    return f"Bearer {key}" if not given and key is not None else given


Caller = Annotated[Principal, Depends(current_principal)]


def at_least(role: Role) -> Callable[[Principal], Awaitable[Principal]]:
    """A dependency that lets through callers with `role` or more. Raises PermissionDenied."""

    async def check(principal: Caller) -> Principal:
        if not has_role(principal, role):
            raise PermissionDenied(f"This needs a key with the role '{role}'; yours has the role '{principal.role}'.")
        return principal

    return check


Manager = Annotated[Principal, Depends(at_least(Role.MANAGER))]
Admin = Annotated[Principal, Depends(at_least(Role.ADMIN))]
