"""Quotas: per minute and at once, charged before and settled after."""

import math
from contextlib import suppress
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.database.database import Database
from manylora.errors import InvalidRequest, QuotaExceeded
from manylora.tenants.gate import TenantGate
from manylora.tenants.interface import Principal, Role
from manylora.tenants.limits import TenantLimits, TenantStore
from manylora.tenants.quotas import QuotaLease, Quotas


@dataclass
class Clock:
    """A clock that stands still."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def _quotas(clock: Clock, **limits: int) -> Quotas:
    quotas = Quotas(clock)
    quotas.set_limits({"acme": TenantLimits(**limits)})
    return quotas


def test_a_tenant_without_quotas_is_never_refused() -> None:
    quotas = Quotas(Clock())
    for _ in range(1000):
        quotas.admit("acme", 10**9)


def test_requests_per_minute_come_back_evenly() -> None:
    clock = Clock()
    quotas = _quotas(clock, requests_per_minute=60)
    for _ in range(60):
        quotas.admit("acme", 1)
    with pytest.raises(QuotaExceeded, match="requests per minute") as caught:
        quotas.admit("acme", 1)
    assert caught.value.retry_after_s == pytest.approx(1.0)
    clock.now += 1.01
    quotas.admit("acme", 1)
    with pytest.raises(QuotaExceeded):
        quotas.admit("acme", 1)


def test_whoever_comes_back_when_told_is_admitted() -> None:
    clock = Clock()
    quotas = _quotas(clock, requests_per_minute=7, tokens_per_minute=500)
    for _ in range(50):
        try:
            quotas.admit("acme", 90).settle(60, 30)
        except QuotaExceeded as error:
            clock.now += math.ceil(error.retry_after_s)
            quotas.admit("acme", 90)


def test_tokens_that_were_not_used_are_given_back() -> None:
    quotas = _quotas(Clock(), tokens_per_minute=1000)
    lease = quotas.admit("acme", 1000)
    with pytest.raises(QuotaExceeded, match="tokens per minute"):
        quotas.admit("acme", 100)
    lease.settle(50, 50)
    quotas.admit("acme", 900)


def test_a_request_larger_than_the_quota_waits_for_a_full_minute_and_leaves_a_debt() -> None:
    clock = Clock()
    quotas = _quotas(clock, tokens_per_minute=100)
    quotas.admit("acme", 300).settle(300, 0)
    with pytest.raises(QuotaExceeded) as caught:
        quotas.admit("acme", 1)
    assert caught.value.retry_after_s == pytest.approx(120.6)
    clock.now += caught.value.retry_after_s
    quotas.admit("acme", 1)


def test_concurrent_requests_count_until_they_are_settled() -> None:
    quotas = _quotas(Clock(), max_concurrent=2)
    first, _ = quotas.admit("acme", 1), quotas.admit("acme", 1)
    with pytest.raises(QuotaExceeded, match="concurrent"):
        quotas.admit("acme", 1)
    first.settle(1, 0)
    first.settle(1, 0)
    quotas.admit("acme", 1)
    with pytest.raises(QuotaExceeded):
        quotas.admit("acme", 1)


def test_a_refused_request_is_charged_nothing() -> None:
    quotas = _quotas(Clock(), requests_per_minute=10, tokens_per_minute=100)
    quotas.admit("acme", 100)
    for _ in range(50):
        with pytest.raises(QuotaExceeded, match="tokens"):
            quotas.admit("acme", 50)
    quotas.set_limits({"acme": TenantLimits(requests_per_minute=10)})
    for _ in range(9):
        quotas.admit("acme", 50)


def test_one_tenants_use_is_not_anothers() -> None:
    quotas = Quotas(Clock())
    quotas.set_limits({name: TenantLimits(requests_per_minute=1) for name in ("acme", "rival")})
    quotas.admit("acme", 1)
    quotas.admit("rival", 1)


def test_a_quota_of_nothing_admits_nothing() -> None:
    for name in ("requests_per_minute", "tokens_per_minute", "max_concurrent"):
        with pytest.raises(QuotaExceeded):
            _quotas(Clock(), **{name: 0}).admit("acme", 1)


def test_a_changed_quota_keeps_the_share_that_is_left() -> None:
    quotas = _quotas(Clock(), tokens_per_minute=100)
    quotas.admit("acme", 50)
    quotas.set_limits({"acme": TenantLimits(tokens_per_minute=1000)})
    quotas.admit("acme", 500)
    with pytest.raises(QuotaExceeded):
        quotas.admit("acme", 10)


def test_many_tenants_that_came_once_are_forgotten() -> None:
    clock = Clock()
    quotas = Quotas(clock)
    for number in range(5000):
        quotas.admit(f"t{number}", 1).settle(1, 0)
    assert len(quotas._accounts) < 2000


_ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), st.integers(0, 400)),
        st.tuples(st.just("settle"), st.integers(0, 400)),
        st.tuples(st.just("wait"), st.integers(0, 90)),
        st.tuples(st.just("limit"), st.integers(0, 500)),
    ),
    max_size=80,
)


@given(_ACTIONS)
def test_no_order_of_events_breaks_the_books(actions: list[tuple[str, int]]) -> None:
    clock, open_leases = Clock(), list[QuotaLease]()
    quotas = _quotas(clock, tokens_per_minute=300, requests_per_minute=20, max_concurrent=5)
    for action, amount in actions:
        if action == "admit":
            with suppress(QuotaExceeded):
                open_leases.append(quotas.admit("acme", amount))
        elif action == "settle" and open_leases:
            open_leases.pop(amount % len(open_leases)).settle(amount, 1)
        elif action == "wait":
            clock.now += amount
        elif action == "limit":
            quotas.set_limits({"acme": TenantLimits(tokens_per_minute=amount, max_concurrent=5)})
        quotas.check_integrity()
        account = quotas._accounts.get("acme")
        assert account is None or account.running == len(open_leases) <= 5


def test_limits_are_changed_one_by_one_and_kept(database: Database) -> None:
    store = TenantStore(database)
    store.change("acme", weight=2.0, requests_per_minute=60)
    store.change("acme", max_pinned=3)
    store.change("acme", requests_per_minute=None)
    assert store.list() == {"acme": TenantLimits(weight=2.0, max_pinned=3)}


@pytest.mark.parametrize("change", [{"weight": 0.0}, {"weight": float("nan")}, {"weight": 1e9}, {"max_adapters": -1}])
def test_a_limit_out_of_range_changes_nothing(database: Database, change: dict[str, float]) -> None:
    store = TenantStore(database)
    with pytest.raises(InvalidRequest):
        store.change("acme", **change)
    assert store.list() == {}


@pytest.mark.anyio
async def test_limits_set_elsewhere_are_noticed_by_a_running_gate(database: Database) -> None:
    gate = TenantGate(database)
    caller = Principal("public", Role.USER)
    await gate.admit(caller, 5, 5)
    TenantStore(database).change("public", max_concurrent=0, weight=3.0)
    await gate.refresh()
    assert gate.authenticate(None).weight == 3.0
    with pytest.raises(QuotaExceeded):
        await gate.admit(caller, 5, 5)
    gate.check_integrity()
