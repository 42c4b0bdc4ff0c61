"""How many requests each tenant has here at a time, and how much of what they sent is in memory.

That is their bodies, and sound once it is decoded: a small file can be a thousand times its size.

One tenant can have half of either: however many requests its keys send, there is room for another's.
"""

from collections import Counter
from dataclasses import dataclass

from manylora.errors import RateLimited, TooLarge, Unavailable

__all__ = ["Presence", "Visit"]

_RETRY_S = 1.0


@dataclass(slots=True)
class Visit:
    """One request: whose it is, once that is known, and the bytes that are held of what it sent."""

    tenant: str | None = None
    num_bytes: int = 0


class Presence:
    """Used on the event loop's thread only. `max_bytes` is for all tenants together, `max_requests` for each."""

    def __init__(self, *, max_requests: int, max_bytes: int) -> None:
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._requests: Counter[str] = Counter()
        self._bytes: Counter[str | None] = Counter()
        self._num_bytes = 0

    def enter(self, visit: Visit, tenant: str) -> None:
        """Count `visit`, and what it holds, as the tenant's. Raises RateLimited."""
        if self._requests[tenant] >= self._max_requests:
            raise RateLimited(
                f"{self._max_requests} requests of this tenant are being answered, as many as may be at a time. "
                "Wait for one of them.",
                retry_after_s=_RETRY_S,
            )
        num_bytes = visit.num_bytes
        self._give_back(visit)
        visit.tenant = tenant
        self._requests[tenant] += 1
        if num_bytes:
            self.hold(visit, num_bytes)

    def has_room(self, visit: Visit, num_bytes: int) -> bool:
        """Whether so many more bytes stay within its tenant's half; all whose tenant is not known have one together."""
        return self._bytes[visit.tenant] + num_bytes <= self._max_bytes // 2

    def hold(self, visit: Visit, num_bytes: int) -> None:
        """So many more bytes of what it sent are in memory. Raises TooLarge, RateLimited or Unavailable."""
        if visit.num_bytes + num_bytes > self._max_bytes // 2:
            raise TooLarge(
                f"This request takes {visit.num_bytes + num_bytes} bytes of memory by itself, more than the "
                f"{self._max_bytes // 2} that a tenant has here. Send less, or raise the server's max_body_memory."
            )
        if not self.has_room(visit, num_bytes):
            raise RateLimited(
                f"What this tenant's requests sent takes more than {self._max_bytes // 2} bytes together. "
                "Wait for some of them to be answered.",
                retry_after_s=_RETRY_S,
            )
        if self._num_bytes + num_bytes > self._max_bytes:
            raise Unavailable("What all requests sent takes as much memory as it may.", retry_after_s=_RETRY_S)
        visit.num_bytes += num_bytes
        if num_bytes:
            self._bytes[visit.tenant] += num_bytes
            self._num_bytes += num_bytes

    def leave(self, visit: Visit) -> None:
        """The request has been answered, or its client has gone."""
        self._give_back(visit)
        if visit.tenant is not None:
            self._requests[visit.tenant] -= 1
            if self._requests[visit.tenant] == 0:
                del self._requests[visit.tenant]

    def _give_back(self, visit: Visit) -> None:
        if visit.num_bytes:
            self._num_bytes -= visit.num_bytes
            self._bytes[visit.tenant] -= visit.num_bytes
            if self._bytes[visit.tenant] == 0:
                del self._bytes[visit.tenant]
            visit.num_bytes = 0

    @property
    def is_empty(self) -> bool:
        return not self._requests and self._num_bytes == 0

    def check_integrity(self) -> None:
        assert self._num_bytes == self._bytes.total()
        assert all(count > 0 for count in (*self._requests.values(), *self._bytes.values()))
