"""What counts usage, and what is counted."""

from typing import Protocol

from manylora.identity import AdapterRef

__all__ = ["UsageSink", "Use"]


class Use(Protocol):
    """What one request used, whatever its outcome: `api.record.RequestRecord` has this shape.

    `tenant` is the caller's. `canary` is the id of the one that decided on the version, empty where none did.
    """

    @property
    def tenant(self) -> str: ...
    @property
    def adapter(self) -> AdapterRef | None: ...
    @property
    def outcome(self) -> str: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def ttft_s(self) -> float | None: ...
    @property
    def canary(self) -> str: ...


class UsageSink(Protocol):
    """Where usage is counted; see `usage.ledger`."""

    def add(self, use: Use) -> None: ...

    def add_probe(self, tenant: str, adapter: AdapterRef, prompt_tokens: int) -> None:
        """Tokens that were run for a tenant's upload of `adapter`, by no request of its own."""
        ...

    async def stored(self) -> None:
        """Wait until what was added is in the database."""
        ...
