"""Who is calling and what they may use: the seam between the routes and the tenants."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class Role(StrEnum):
    """What a key may do, each role including the one before it."""

    USER = "user"
    MANAGER = "manager"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller. `weight` is the tenant's fair share in the scheduler; `key_id` is None in open mode."""

    tenant: str
    role: Role
    key_id: str | None = None
    weight: float = 1.0


class Lease(Protocol):
    """One admitted request's hold on its tenant's quotas."""

    def settle(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Replace the estimate by what was used and give the place back. Later calls do nothing."""
        ...


class Gate(Protocol):
    """Keys and quotas."""

    @property
    def is_open(self) -> bool:
        """Whether no key exists, so that everybody is admin of the tenant `public`."""
        ...

    def authenticate(self, authorization: str | None) -> Principal:
        """The caller behind an `Authorization` header. Raises AuthenticationFailed."""
        ...

    async def admit(self, principal: Principal, prompt_tokens: int, max_completion_tokens: int) -> Lease:
        """Charge a request before it is queued. Raises QuotaExceeded, which says which quota and when to return."""
        ...
