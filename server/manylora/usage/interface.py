"""What counts usage, and what is counted."""

from dataclasses import dataclass
from typing import Protocol

from manylora.identity import AdapterRef

__all__ = ["UsageSink", "Use"]


@dataclass(frozen=True, slots=True)
class Use:
    """What one finished request used, whatever its outcome. `tenant` is the caller's."""

    tenant: str
    adapter: AdapterRef | None
    outcome: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class UsageSink(Protocol):
    """Where usage is counted; see `usage.ledger`."""

    def add(self, use: Use) -> None: ...

    async def stored(self) -> None:
        """Wait until what was added is in the database."""
        ...
