"""Quotas that hold for all servers on one database together: each leases some of a tenant's, and gives back the rest.

A tenant without quotas costs nothing. For one with quotas a server takes from the shared bucket what a request needs,
or, where that is more, a twentieth of the quota divided by the servers, so that most requests are admitted from memory.
What is not used goes back. While the database does not answer, each server lets its part of the quota through.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from manylora.database.database import Database
from manylora.errors import ManyloraError, Unavailable
from manylora.tenants.buckets import SharedBuckets, Taken, Want
from manylora.tenants.interface import Lease
from manylora.tenants.limits import TenantLimits
from manylora.tenants.quotas import Kind, Quotas, refused

__all__ = ["SharedQuotas"]

_LEASES: Final = 20  # of a quota, if all servers had one
_IDLE_S: Final = 5.0
_ROUND_S: Final = 1.0
_BETWEEN_ROUNDS_S: Final = 0.05
# A request waits so long for the database before its server's own part of the quota decides.
_PATIENCE_S: Final = 1.0
_AWAY_S: Final = 2.0  # then nobody waits, for so long
# What was refused is not asked for again so soon: whoever sends a thousand requests in vain costs a few queries.
_CLOSED_S: Final = 0.1
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Closed:
    """What was refused: until when as much or more of it is not asked for again, and when there is enough of it."""

    need: float
    until: float
    open_at: float


@dataclass(slots=True)
class _Share:
    """What this server holds of one tenant's quotas."""

    levels: dict[Kind, float] = field(default_factory=lambda: {"requests": 0.0, "tokens": 0.0})
    seats: int = 0
    running: int = 0
    alone: int = 0  # of those that run, the ones that the database was not asked for
    taking: int = 0  # questions to the database that were not answered yet
    used_at: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    closed: dict[Kind, _Closed] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether nothing runs, is on its way here or could be given back."""
        return self.running == self.seats == self.taking == 0 and all(level <= 0 for level in self.levels.values())


class _Admitted:
    """One admitted request. Implements `tenants.interface.Lease`."""

    def __init__(self, share: _Share, charged: int, due: Callable[[], None]) -> None:
        self._share: _Share | None = share
        self._charged = charged
        self._due = due

    def settle(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Replace what was charged by what was used, and give the place back. Later calls do nothing."""
        share, self._share = self._share, None
        if share is not None:
            share.running -= 1
            if self._charged:
                share.levels["tokens"] += self._charged - prompt_tokens - completion_tokens
            self._due()


class _AdmittedAlone:
    """One request that this server's part of the quotas let through. Implements `tenants.interface.Lease`.

    It holds a place among what runs here, so that once the database answers its place is asked for with the others.
    """

    def __init__(self, share: _Share, lease: Lease, due: Callable[[], None]) -> None:
        self._share: _Share | None = share
        self._lease = lease
        self._due = due
        share.running += 1
        share.alone += 1

    def settle(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Replace what was charged by what was used, and give the place back. Later calls do nothing."""
        share, self._share = self._share, None
        if share is not None:
            share.running -= 1
            share.alone -= 1
            self._lease.settle(prompt_tokens, completion_tokens)
            self._due()


class SharedQuotas:
    """Used on the event loop. `local` knows the limits, and admits tenants that have none."""

    def __init__(
        self,
        database: Database,
        buckets: SharedBuckets,
        local: Quotas,
        *,
        clock: Callable[[], float] = time.monotonic,
        count_fallback: Callable[[], None] = lambda: None,
    ) -> None:
        self._database = database
        self._buckets = buckets
        self._local = local
        self._alone = Quotas(clock)
        self._clock = clock
        self._count_fallback = count_fallback
        self._shares: dict[str, _Share] = {}
        self._away_until = -math.inf
        self._due = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._give_back(), name="quotas")

    async def aclose(self) -> None:
        """Give back everything."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        with suppress(ManyloraError):  # others see that this server is gone, and buckets fill up by themselves
            for tenant, share in list(self._shares.items()):
                await self._return(tenant, share, is_idle=True)
            await self._database.run(self._buckets.leave)

    async def admit(self, tenant: str, tokens: int) -> Lease:
        """Charge one request of at most `tokens` tokens, all quotas or none. Raises QuotaExceeded."""
        limits = self._local.limits_of(tenant)
        if limits.requests_per_minute is limits.tokens_per_minute is limits.max_concurrent is None:
            return self._local.admit(tenant, tokens)
        while True:
            share = self._shares.setdefault(tenant, _Share())
            async with share.lock:
                # One that was given back while this waited is nobody's any more.
                if self._shares.get(tenant) is share:
                    return await self._admit(tenant, share, limits, tokens)

    async def _admit(self, tenant: str, share: _Share, limits: TenantLimits, tokens: int) -> Lease:
        """`admit`, under the share's lock."""
        share.used_at = self._clock()
        try:
            await self._fill(tenant, share, limits, tokens)
        except (Unavailable, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                self._away_until = self._clock() + _AWAY_S
            self._count_fallback()
            held = share.running - share.alone
            self._alone.update_limits({tenant: _part_of(limits, self._buckets.num_servers, held)})
            return _AdmittedAlone(share, self._alone.admit(tenant, tokens), self._due.set)
        charged = 0
        if limits.requests_per_minute is not None:
            share.levels["requests"] -= 1
        if limits.tokens_per_minute is not None:
            share.levels["tokens"] -= tokens
            charged = tokens
        share.running += 1
        return _Admitted(share, charged, self._due.set)

    async def _fill(self, tenant: str, share: _Share, limits: TenantLimits, tokens: int) -> None:
        wants = self._wants(share, limits, tokens)
        if not wants:
            return
        now = self._clock()
        if now < self._away_until:
            raise Unavailable("The database does not answer.")
        for want in wants:
            closed = share.closed.get(want.kind)
            if closed is not None and now < closed.until and want.need >= closed.need:
                raise refused(tenant, want.kind, limits, tokens, closed.open_at - now)
        # Not given up with a request whose client leaves: what it brings is this server's.
        taking = asyncio.ensure_future(self._take(tenant, share, wants))
        taking.add_done_callback(lambda done: done.cancelled() or done.exception())
        taken = await asyncio.wait_for(asyncio.shield(taking), _PATIENCE_S)
        if taken.refused is not None:
            now = self._clock()
            (need,) = [want.need for want in wants if want.kind == taken.refused]
            share.closed[taken.refused] = _Closed(need, now + min(taken.wait_s, _CLOSED_S), now + taken.wait_s)
            raise refused(tenant, taken.refused, limits, tokens, taken.wait_s)

    async def _take(self, tenant: str, share: _Share, wants: list[Want]) -> Taken:
        share.taking += 1
        try:
            taken = await self._database.run(partial(self._buckets.take, tenant, wants))
        finally:
            share.taking -= 1
        for kind, amount in taken.amounts.items():
            if kind == "seats":
                share.seats = int(amount)
            else:
                share.levels[kind] += amount
        return taken

    def _wants(self, share: _Share, limits: TenantLimits, tokens: int) -> list[Want]:
        """What there is too little of, in the order in which every server locks it."""
        wants = []
        if limits.max_concurrent is not None and share.seats <= share.running:
            lease = share.running + self._lease(limits.max_concurrent)
            wants.append(Want("seats", limits.max_concurrent, share.running + 1, 0, lease))
        for kind, capacity in _quotas_in(limits):
            level, amount = share.levels[kind], tokens if kind == "tokens" else 1
            if capacity is not None and min(amount, capacity) > level:
                need = min(amount, capacity) - level
                wants.append(Want(kind, capacity, need, amount - level, self._lease(capacity)))
            elif capacity == 0:
                wants.append(Want(kind, 0, 1, 1, 0))
        return wants

    def _lease(self, capacity: int) -> float:
        return capacity / (_LEASES * self._buckets.num_servers)

    async def _give_back(self) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._due.wait(), _ROUND_S)
            self._due.clear()
            try:
                for tenant, share in list(self._shares.items()):
                    if not share.lock.locked():
                        await self._return(tenant, share, is_idle=self._clock() - share.used_at > _IDLE_S)
            except Unavailable:
                await asyncio.sleep(_ROUND_S)  # which the database has said
            except Exception:  # noqa: BLE001 - whatever it is, this goes on
                _log.exception("What is left of quotas is given back later")
            await asyncio.sleep(_BETWEEN_ROUNDS_S)

    async def _return(self, tenant: str, share: _Share, *, is_idle: bool) -> None:
        """Give back what this server has no use for."""
        limits = self._local.limits_of(tenant)
        async with share.lock:
            units: dict[Kind, tuple[float, int]] = {}
            for kind, capacity in _quotas_in(limits):
                level = share.levels[kind]
                kept = 0.0 if is_idle else 2 * self._lease(capacity or 0)
                if capacity and level > kept:
                    units[kind] = level - kept, capacity
            spare = 0 if is_idle else int(self._lease(limits.max_concurrent or 0))
            seats = share.running + spare if share.seats > share.running + spare else None
            if units or seats is not None:
                await self._database.run(partial(self._buckets.give_back, tenant, units, seats))
            for kind, (amount, _) in units.items():
                share.levels[kind] -= amount
            share.seats = share.seats if seats is None else seats
            for kind, capacity in _quotas_in(limits):
                if not capacity:  # a quota that there is no more
                    share.levels[kind] = 0.0
            # What ended meanwhile brought something back: that is for the next round.
            if is_idle and share.is_empty and self._shares.get(tenant) is share:
                del self._shares[tenant]

    def check_integrity(self) -> None:
        for tenant, share in self._shares.items():
            assert share.running >= share.alone >= 0, tenant
            assert all(math.isfinite(level) for level in share.levels.values())


def _quotas_in(limits: TenantLimits) -> tuple[tuple[Kind, int | None], ...]:
    return ("requests", limits.requests_per_minute), ("tokens", limits.tokens_per_minute)


def _part_of(limits: TenantLimits, num_servers: int, num_held: int) -> TenantLimits:
    """One server's part of the quotas, of each at least one unit where there is any.

    Of the places at once, `num_held` are in use by requests that the database knows.
    """

    def part(quota: int | None) -> int | None:
        return None if quota is None else math.ceil(quota / num_servers)

    places = part(limits.max_concurrent)
    if places is not None:
        places = max(places - num_held, 0)
    return replace(
        limits,
        requests_per_minute=part(limits.requests_per_minute),
        tokens_per_minute=part(limits.tokens_per_minute),
        max_concurrent=places,
    )
