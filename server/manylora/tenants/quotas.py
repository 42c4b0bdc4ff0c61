"""What a tenant may use per minute and at once: two token buckets and a counter per tenant.

A bucket holds at most one minute's worth and fills evenly, so a quota of 60 per minute is one per second with
a burst of 60. Tokens are charged before a request is queued, with the most it can use, and corrected once it
has ended. A request that could use more than a minute's worth waits for a full bucket and leaves it in debt.
Requests are admitted and settled on the event loop's thread; limits are replaced from the thread that read them.
"""

import math
from collections.abc import Callable, Mapping
from typing import Final, Literal

from manylora.errors import QuotaExceeded
from manylora.tenants.limits import TenantLimits, exceeded

Kind = Literal["requests", "tokens", "seats"]
MINUTE_S: Final = 60.0
# When nothing says how soon: a running request has to end first.
BUSY_RETRY_S: Final = 1.0
# A quota of nothing does not fill up by waiting.
NEVER_RETRY_S: Final = 3600.0
# Above this many remembered tenants, those whose buckets are full again and who run nothing are forgotten.
_MAX_IDLE_ACCOUNTS: Final = 1024


class Bucket:
    """`capacity` units, refilled evenly within a minute."""

    def __init__(self, capacity: int, now: float) -> None:
        self.capacity = capacity
        self.level = float(capacity)
        self._updated = now

    def refill(self, now: float) -> None:
        gained = (now - self._updated) * self.capacity / MINUTE_S
        self.level = min(self.level + max(gained, 0.0), float(self.capacity))
        self._updated = now

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` can be taken; 0 if now. More than the capacity needs a full bucket."""
        if self.capacity == 0:
            return NEVER_RETRY_S
        short = min(amount, self.capacity) - self.level
        # Who comes back exactly when told must not fail on the last bit of a sum of floats.
        return short * MINUTE_S / self.capacity if short > self.capacity * 1e-9 else 0.0

    def take(self, amount: float) -> None:
        """Take `amount`, into debt if need be. A negative amount gives back."""
        self.level = min(self.level - amount, float(self.capacity))

    def resize(self, capacity: int) -> None:
        """Keep the share that is left: a changed quota neither fills nor empties the bucket."""
        share = self.level / self.capacity if self.capacity else 1.0
        self.capacity, self.level = capacity, share * capacity


class _Account:
    """One tenant's state. A bucket is None while there is no such quota."""

    def __init__(self) -> None:
        self.running = 0
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None

    def update(self, limits: TenantLimits, now: float) -> None:
        self.requests = _updated(self.requests, limits.requests_per_minute, now)
        self.tokens = _updated(self.tokens, limits.tokens_per_minute, now)

    @property
    def is_idle(self) -> bool:
        buckets = [b for b in (self.requests, self.tokens) if b is not None]
        return self.running == 0 and all(b.level >= b.capacity for b in buckets)


def _updated(bucket: Bucket | None, capacity: int | None, now: float) -> Bucket | None:
    if capacity is None:
        return None
    if bucket is None:
        return Bucket(capacity, now)
    bucket.refill(now)
    if bucket.capacity != capacity:
        bucket.resize(capacity)
    return bucket


class QuotaLease:
    """One admitted request. Implements `tenants.interface.Lease`."""

    def __init__(self, account: _Account, charged: int) -> None:
        self._account: _Account | None = account
        self._charged = charged

    def settle(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Replace what was charged by what was used, and give the place back. Later calls do nothing."""
        account, self._account = self._account, None
        if account is not None:
            account.running -= 1
            if account.tokens is not None:
                account.tokens.take(prompt_tokens + completion_tokens - self._charged)


class Quotas:
    """All tenants' accounts."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._limits: dict[str, TenantLimits] = {}
        self._accounts: dict[str, _Account] = {}

    def limits_of(self, tenant: str) -> TenantLimits:
        return self._limits.get(tenant) or TenantLimits()

    def update_limits(self, limits: Mapping[str, TenantLimits]) -> None:
        """Set the quotas of these tenants and leave the others'."""
        self._limits.update(limits)

    def set_limits(self, limits: Mapping[str, TenantLimits]) -> None:
        """Set all tenants' quotas, from the next request on; what runs keeps running."""
        self._limits = dict(limits)

    def admit(self, tenant: str, tokens: int) -> QuotaLease:
        """Charge one request of at most `tokens` tokens, all quotas or none. Raises QuotaExceeded."""
        limits, now = self.limits_of(tenant), self._clock()
        account = self._accounts.setdefault(tenant, _Account())
        account.update(limits, now)
        if limits.max_concurrent is not None and account.running >= limits.max_concurrent:
            raise refused(tenant, "seats", limits, tokens, BUSY_RETRY_S)
        if account.requests is not None and (wait := account.requests.wait_s(1)) > 0:
            raise refused(tenant, "requests", limits, tokens, wait)
        if account.tokens is not None and (wait := account.tokens.wait_s(tokens)) > 0:
            raise refused(tenant, "tokens", limits, tokens, wait)
        if account.requests is not None:
            account.requests.take(1)
        if account.tokens is not None:
            account.tokens.take(tokens)
        account.running += 1
        self._forget_idle(now)
        return QuotaLease(account, tokens if account.tokens is not None else 0)

    def _forget_idle(self, now: float) -> None:
        if len(self._accounts) <= _MAX_IDLE_ACCOUNTS:
            return
        for tenant, account in list(self._accounts.items()):
            account.update(self.limits_of(tenant), now)
            if account.is_idle:
                del self._accounts[tenant]

    def check_integrity(self) -> None:
        for tenant, account in self._accounts.items():
            assert account.running >= 0, tenant
            for bucket in (account.requests, account.tokens):
                assert bucket is None or bucket.level <= bucket.capacity
                assert bucket is None or math.isfinite(bucket.level)


def refused(tenant: str, kind: Kind, limits: TenantLimits, tokens: int, wait_s: float) -> QuotaExceeded:
    """What a tenant is told whose quota of `kind` has too little for a request of at most `tokens` tokens."""
    what = {
        "seats": f"concurrent requests ({limits.max_concurrent})",
        "requests": f"requests per minute ({limits.requests_per_minute})",
        "tokens": f"tokens per minute ({limits.tokens_per_minute}; this request may use {tokens})",
    }[kind]
    return exceeded(tenant, what, f"Try again in {math.ceil(wait_s)} s.", wait_s)
