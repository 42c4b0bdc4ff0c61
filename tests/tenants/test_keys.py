"""Keys: made, shown once, kept as a hash, looked up, revoked."""

import asyncio

import pytest

from manylora.database.database import Database
from manylora.errors import AuthenticationFailed, InvalidRequest, NotFound
from manylora.tenants.gate import TenantGate
from manylora.tenants.interface import Role
from manylora.tenants.keys import KeyStore, hash_secret, is_secret_of, parse_key


def test_a_key_says_whose_it_is_and_what_it_may_do(database: Database) -> None:
    _, text = KeyStore(database).create("acme", Role.MANAGER)
    principal = TenantGate(database).authenticate(f"Bearer {text}")
    assert (principal.tenant, principal.role) == ("acme", Role.MANAGER)


def test_nothing_in_the_database_is_the_secret(database: Database, tmp_path: object) -> None:
    key, text = KeyStore(database).create("acme", Role.USER)
    parsed = parse_key(text)
    assert parsed is not None
    assert key.secret_hash == hash_secret(parsed[1])
    database.close()
    for file in tmp_path.iterdir():  # type: ignore[attr-defined]
        assert parsed[1].encode() not in file.read_bytes()


def test_two_keys_never_share_a_prefix_or_a_secret(database: Database) -> None:
    texts = [KeyStore(database).create("acme", Role.USER)[1] for _ in range(20)]
    assert len({text.split("_", 2)[1] for text in texts}) == len({text.split("_", 2)[2] for text in texts}) == 20


def test_a_lent_key_is_of_this_server_alone_and_ends_with_its_block(database: Database) -> None:
    with TenantGate(database).lending("acme", "job-1") as text:
        assert text == "", "an open server stays open"
    KeyStore(database).create("ops", Role.ADMIN)
    gate = TenantGate(database)
    with gate.lending("acme", "job-1") as text:
        principal = gate.authenticate(f"Bearer {text}")
        assert (principal.tenant, principal.role, principal.key_id) == ("acme", Role.MANAGER, "job-1")
        with pytest.raises(AuthenticationFailed):
            gate.authenticate(f"Bearer {text[:-1]}x")
        with pytest.raises(AuthenticationFailed):
            TenantGate(database).authenticate(f"Bearer {text}")
    with pytest.raises(AuthenticationFailed):
        gate.authenticate(f"Bearer {text}")
    assert [key.tenant for key in KeyStore(database).list()] == ["ops"]


def test_without_keys_everybody_is_admin_of_public(database: Database) -> None:
    gate = TenantGate(database)
    assert gate.is_open
    principal = gate.authenticate(None)
    assert (principal.tenant, principal.role, principal.key_id) == ("public", Role.ADMIN, None)


def test_revoking_the_last_key_does_not_open_the_server(database: Database) -> None:
    key, text = KeyStore(database).create("acme", Role.USER)
    KeyStore(database).revoke(key.id)
    gate = TenantGate(database)
    assert not gate.is_open
    for header in (None, f"Bearer {text}"):
        with pytest.raises(AuthenticationFailed):
            gate.authenticate(header)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:-1],
        lambda text: text[:-1] + ("A" if text[-1] != "A" else "B"),
        lambda text: text.replace("ml_", "ml-"),
        lambda text: "ml_000000000000_" + text[16:],
        lambda text: text + "=",
        lambda text: text + "\n",
        lambda text: "",
    ],
)
def test_a_key_with_any_flaw_is_refused_in_the_same_words(database: Database, spoil: object) -> None:
    _, text = KeyStore(database).create("acme", Role.USER)
    gate = TenantGate(database)
    with pytest.raises(AuthenticationFailed) as caught:
        gate.authenticate(f"Bearer {spoil(text)}x")  # type: ignore[operator]
    assert caught.value.message == "The API key is not known, has expired or was revoked."


@pytest.mark.parametrize("scheme", ["Basic", "", "Token", "BearerX"])
def test_only_the_bearer_scheme_is_taken(database: Database, scheme: str) -> None:
    _, text = KeyStore(database).create("acme", Role.USER)
    with pytest.raises(AuthenticationFailed):
        TenantGate(database).authenticate(f"{scheme} {text}")


@pytest.mark.parametrize("between", ["\t", "  ", " \t "])
def test_any_white_space_parts_scheme_and_key(database: Database, between: str) -> None:
    _, text = KeyStore(database).create("acme", Role.USER)
    assert TenantGate(database).authenticate(f"Bearer{between}{text}").tenant == "acme"


def test_a_missing_key_is_compared_as_a_wrong_one_is() -> None:
    assert not is_secret_of(None, "x" * 43)
    assert not is_secret_of(None, "")


@pytest.mark.parametrize("by", ["id", "prefix", "shown", "whole"])
def test_a_key_can_be_revoked_by_any_of_its_names(database: Database, by: str) -> None:
    store = KeyStore(database)
    key, text = store.create("acme", Role.USER)
    kept, _ = store.create("acme", Role.USER)
    name = {"id": key.id, "prefix": key.prefix, "shown": f"ml_{key.prefix}", "whole": text}[by]
    revoked = store.revoke(name)
    assert store.revoke(name).revoked == revoked.revoked
    assert {k.id: k.revoked is not None for k in store.list()} == {key.id: True, kept.id: False}


def test_revoking_an_unknown_key_is_an_error(database: Database) -> None:
    with pytest.raises(NotFound):
        KeyStore(database).revoke("nobody")


@pytest.mark.parametrize("tenant", ["", "ACME", "a b", "../x", "-a", "x" * 65, "a\n"])
def test_a_tenants_name_is_a_plain_one(database: Database, tenant: str) -> None:
    with pytest.raises(InvalidRequest):
        KeyStore(database).create(tenant, Role.USER)


@pytest.mark.anyio
async def test_a_key_made_or_revoked_elsewhere_is_noticed(database: Database) -> None:
    gate = TenantGate(database)
    key, text = KeyStore(database).create("acme", Role.USER)
    await gate.refresh()
    assert gate.authenticate(f"Bearer {text}").key_id == key.id
    KeyStore(database).revoke(key.id)
    await gate.refresh()
    with pytest.raises(AuthenticationFailed):
        gate.authenticate(f"Bearer {text}")


@pytest.mark.anyio
async def test_when_a_key_was_last_used_is_written_together_and_at_the_end(database: Database) -> None:
    store = KeyStore(database)
    used, text = store.create("acme", Role.USER)
    unused, _ = store.create("acme", Role.USER)
    gate = TenantGate(database)
    gate.start()
    for _ in range(3):
        gate.authenticate(f"Bearer {text}")
    await gate.aclose()
    last_used = {key.id: key.last_used for key in store.list()}
    assert last_used[unused.id] is None
    assert (last_used[used.id] or 0) >= used.created


@pytest.mark.anyio
@pytest.mark.parametrize("error", [KeyError("a bug"), RuntimeError("another"), NotFound("ours")])
async def test_a_look_at_the_database_that_fails_is_not_the_last_one(
    error: Exception, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a key that was taken back would be good for ever."""
    monkeypatch.setattr("manylora.database.notices._POLL_S", 0.001)
    gate = TenantGate(database)
    key, text = KeyStore(database).create("acme", Role.USER)
    await gate.refresh()
    load, num_failed = gate._load, 0

    def failing() -> None:
        nonlocal num_failed
        num_failed += 1
        if num_failed < 3:
            raise error
        load()

    monkeypatch.setattr(gate, "_load", failing)
    gate.start()
    KeyStore(database).revoke(key.id)
    while True:
        try:
            gate.authenticate(f"Bearer {text}")
        except AuthenticationFailed:
            break
        await asyncio.sleep(0.001)
    await gate.aclose()
