"""What another process changes is followed at the cost of the change."""

import asyncio

import pytest
from sqlalchemy import delete, text, update

from manylora.database.database import Database
from manylora.database.tables import KeyRow
from manylora.errors import AuthenticationFailed
from manylora.tenants.gate import TenantGate
from manylora.tenants.interface import Role
from manylora.tenants.keys import KeyStore
from manylora.tenants.limits import TenantStore

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def gate(database: Database) -> TenantGate:
    for number in range(30):
        KeyStore(database).create(f"tenant-{number}", Role.USER)
        TenantStore(database).change(f"tenant-{number}", weight=2.0)
    return TenantGate(database)


async def test_one_change_among_many_rows_reads_one_row(
    database: Database, gate: TenantGate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "_load_all", lambda: pytest.fail("everything is read again"))
    seen = gate._seen
    made, secret = KeyStore(database).create("acme", Role.MANAGER)
    assert [key.id for key in KeyStore(database).changed(seen)[0]] == [made.id]
    await gate.refresh()
    assert gate.authenticate(f"Bearer {secret}").tenant == "acme"
    TenantStore(database).change("acme", weight=3.0)
    assert list(TenantStore(database).changed(gate._seen)[0]) == ["acme"]
    await gate.refresh()
    assert gate.authenticate(f"Bearer {secret}").weight == 3.0
    for _ in range(2):  # revoking again is no change, and is followed all the same
        KeyStore(database).revoke(made.id)
        await gate.refresh()
        with pytest.raises(AuthenticationFailed):
            gate.authenticate(f"Bearer {secret}")


async def test_many_changes_at_once_and_the_same_row_twice(
    database: Database, gate: TenantGate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "_load_all", lambda: pytest.fail("everything is read again"))
    texts = [KeyStore(database).create("acme", Role.USER)[1] for _ in range(5)]
    for weight in (4.0, 5.0):
        TenantStore(database).change("acme", weight=weight)
    await gate.refresh()
    assert {gate.authenticate(f"Bearer {text}").weight for text in texts} == {5.0}
    assert await asyncio.to_thread(lambda: gate._seen) == database.revision("tenants")


async def test_a_change_that_an_older_version_or_a_hand_made_is_found_too(database: Database, gate: TenantGate) -> None:
    made, secret = KeyStore(database).create("acme", Role.USER)
    await gate.refresh()
    with database.write("tenants") as session:  # raises the topic's number and stamps no row
        session.execute(update(KeyRow).where(KeyRow.id == made.id).values(revoked=1))
    await gate.refresh()
    with pytest.raises(AuthenticationFailed):
        gate.authenticate(f"Bearer {secret}")
    with database.write("tenants") as session:
        session.execute(delete(KeyRow).where(KeyRow.tenant == "tenant-3"))
    await gate.refresh()
    assert "tenant-3" not in {key.tenant for key in gate._keys.values()}


async def test_a_change_without_a_trace_is_found_behind_one_that_left_a_trace(
    database: Database, gate: TenantGate
) -> None:
    made, secret = KeyStore(database).create("acme", Role.USER)
    await gate.refresh()
    with database.write(None) as session:
        session.execute(update(KeyRow).where(KeyRow.id == made.id).values(revoked=1))
        session.execute(text("UPDATE revisions SET value = value + 1 WHERE topic = 'tenants'"))
    TenantStore(database).change("tenant-1", weight=7.0)
    await gate.refresh()
    with pytest.raises(AuthenticationFailed):
        gate.authenticate(f"Bearer {secret}")
