"""One tenant has half of what there is, whatever it sends; what it holds is given back however its requests end."""

from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.errors import RateLimited, TooLarge, Unavailable
from manylora.settings import Settings
from manylora.tenants.interface import Principal, Role
from manylora.tenants.presence import Presence, Visit

from .conftest import Rig
from .test_streaming import BODY, Connection

KIB = 1024


@pytest.fixture
def crowd(tmp_path: Path) -> Iterator[Rig]:
    """Two requests for each tenant, bodies of 64 KiB for each; the engine answers when it is told to."""
    rig = Rig(Settings(data_dir=tmp_path, max_tenant_requests=2, max_body=64 * KIB, max_body_memory=128 * KIB))
    rig.gate.keys |= {name: Principal(name, Role.USER) for name in ("acme", "rival")}
    rig.engine.step_s = 3600
    yield rig
    rig.app.state.services.presence.check_integrity()
    assert rig.app.state.services.presence.is_empty


def ask(rig: Rig, tenant: str, size: int = 1) -> Connection:
    connection = Connection(rig.app, {**BODY, "prompt": "x" * size, "stream": False})
    connection.scope["headers"].append((b"authorization", f"Bearer {tenant}".encode()))
    return connection


def status(connection: Connection) -> int:
    code: int = connection.sent[0]["status"]
    return code


@pytest.mark.anyio
async def test_a_tenants_requests_leave_room_for_others(crowd: Rig) -> None:
    running = [ask(crowd, "acme") for _ in range(2)]
    async with anyio.create_task_group() as group:
        for connection in running:
            group.start_soon(connection.run)
        while len(crowd.engine.open) < 2:
            await anyio.sleep(0.001)
        for _ in range(2):
            refused = ask(crowd, "acme")
            await refused.run()
            assert status(refused) == 429
            assert b"rate_limited" in refused.sent[1]["body"]
        other = ask(crowd, "rival")
        group.start_soon(other.run)
        while len(crowd.engine.open) < 3:
            await anyio.sleep(0.001)
        for connection in (*running, other):
            connection.leave()
    assert not crowd.engine.open


@pytest.mark.anyio
async def test_a_tenants_bodies_leave_room_for_others(crowd: Rig) -> None:
    first = ask(crowd, "acme", 200)
    crowd.engine.context_length = 10**6
    large = ask(crowd, "acme", 60 * KIB)
    async with anyio.create_task_group() as group:
        group.start_soon(large.run)
        while len(crowd.engine.open) < 1:
            await anyio.sleep(0.001)
        refused = ask(crowd, "acme", 10 * KIB)
        await refused.run()
        assert status(refused) == 429
        other = ask(crowd, "rival", 60 * KIB)
        group.start_soon(other.run)
        while len(crowd.engine.open) < 2:
            await anyio.sleep(0.001)
        for connection in (large, other):
            connection.leave()
    async with anyio.create_task_group() as group:
        group.start_soon(first.run)
        while len(crowd.engine.open) < 1:
            await anyio.sleep(0.001)
        first.leave()


def test_probes_and_refused_keys_take_no_place(crowd: Rig) -> None:
    for _ in range(5):
        assert crowd.client.get("/health").status_code == 200
        assert crowd.client.get("/v1/models").status_code == 401
        assert crowd.client.get("/v1/models", headers={"authorization": "Bearer acme"}).status_code == 200


def test_a_request_that_no_tenant_ever_has_room_for_is_not_told_to_wait() -> None:
    presence = Presence(max_requests=3, max_bytes=100)
    first, second = Visit(), Visit()
    for visit in (first, second):
        presence.enter(visit, "a")
        presence.hold(visit, 20)
    with pytest.raises(RateLimited):
        presence.hold(first, 11)
    with pytest.raises(TooLarge, match="takes 51 bytes of memory by itself"):
        presence.hold(second, 31)
    presence.hold(first, 10)
    presence.leave(first)
    presence.leave(second)
    assert presence.is_empty


def test_what_a_request_held_before_its_tenant_was_known_becomes_the_tenants() -> None:
    presence = Presence(max_requests=3, max_bytes=100)
    known, late, other = Visit(), Visit(), Visit()
    presence.enter(known, "a")
    presence.hold(known, 30)
    presence.hold(late, 25)
    presence.hold(other, 20)
    assert presence.has_room(other, 5)
    assert not presence.has_room(other, 6)
    with pytest.raises(RateLimited):
        presence.enter(late, "a")
    assert presence.has_room(other, 30)
    presence.enter(other, "b")
    presence.check_integrity()
    for visit in (known, late, other):
        presence.leave(visit)
    presence.check_integrity()
    assert presence.is_empty


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 40), st.booleans())))
def test_what_is_taken_is_given_back(steps: list[tuple[str, int, bool]]) -> None:
    presence = Presence(max_requests=3, max_bytes=100)
    here: list[Visit] = []
    for tenant, size, leaves in steps:
        visit = Visit()
        try:
            presence.enter(visit, tenant)
            presence.hold(visit, size)
        except (RateLimited, Unavailable):
            presence.leave(visit)
        else:
            here.append(visit)
        if leaves and here:
            presence.leave(here.pop(0))
        presence.check_integrity()
        for name in "abc":
            mine = [v for v in here if v.tenant == name]
            assert len(mine) <= 3
            assert sum(v.num_bytes for v in mine) <= 50
        assert sum(v.num_bytes for v in here) <= 100
    for visit in here:
        presence.leave(visit)
    presence.check_integrity()
