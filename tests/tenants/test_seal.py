"""A server that had keys is not open again because its database lost them."""

from pathlib import Path

import pytest
from sqlalchemy import delete
from typer.testing import CliRunner

from manylora.catalog.store import open_store
from manylora.cli.main import build
from manylora.database.database import Database, open_database
from manylora.database.tables import KeyRow
from manylora.errors import AuthenticationFailed, StartupError
from manylora.serving.process import safe_host
from manylora.settings import Settings
from manylora.tenants.gate import TenantGate
from manylora.tenants.interface import Role
from manylora.tenants.keys import KeyStore
from manylora.tenants.seal import Seal

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", allow_open=True, host="0.0.0.0")


def database_of(settings: Settings) -> Database:
    return open_database(settings.resolved_database_url)


def lose_database(settings: Settings) -> None:
    for file in settings.data_dir.glob("registry.sqlite3*"):
        file.unlink()


def command(settings: Settings, *words: str) -> None:
    done = CliRunner().invoke(build(), ["keys", *words, "--data-dir", str(settings.data_dir)])
    assert done.exit_code == 0, done.output


def test_a_lost_database_does_not_open_a_server_that_had_keys(settings: Settings) -> None:
    command(settings, "create", "--tenant", "acme", "--role", "admin")
    assert safe_host(settings) == "0.0.0.0"
    lose_database(settings)
    for host in ("0.0.0.0", "127.0.0.1"):
        for allow_open in (True, False):
            changed = settings.model_copy(update={"host": host, "allow_open": allow_open})
            with pytest.raises(StartupError, match="manylora keys reopen"):
                safe_host(changed)


def test_a_new_key_or_a_word_is_the_way_out(settings: Settings) -> None:
    for way_out in (("create", "--tenant", "acme", "--role", "admin"), ("reopen", "--yes")):
        command(settings, "create", "--tenant", "acme", "--role", "admin")
        lose_database(settings)
        with pytest.raises(StartupError):
            safe_host(settings)
        command(settings, *way_out)
        assert safe_host(settings) == "0.0.0.0"


def test_the_word_has_to_be_said(settings: Settings) -> None:
    command(settings, "create", "--tenant", "acme", "--role", "admin")
    asked = CliRunner().invoke(build(), ["keys", "reopen", "--data-dir", str(settings.data_dir)], input="n\n")
    assert asked.exit_code != 0
    assert Seal(settings.data_dir).is_set()


def test_a_server_that_never_had_keys_is_open(settings: Settings) -> None:
    assert safe_host(settings) == "0.0.0.0"
    database = database_of(settings)
    assert TenantGate(database, Seal(settings.data_dir)).is_open
    database.close()


@pytest.mark.parametrize("lost", ["data folder", "store"])
async def test_either_mark_is_enough(settings: Settings, tmp_path: Path, lost: str) -> None:
    store = open_store(f"file://{tmp_path}/store", tmp_path / "cache")
    database = database_of(settings)
    KeyStore(database).create("acme", Role.USER)
    TenantGate(database, Seal(settings.data_dir, store))  # a key made before there were marks, or by another program
    with database.write("tenants") as session:
        session.execute(delete(KeyRow))
    ((settings.data_dir if lost == "data folder" else tmp_path / "store") / "had_keys").unlink()
    with pytest.raises(StartupError, match="had API keys"):
        TenantGate(database, Seal(settings.data_dir, store))
    database.close()
    store.close()


@pytest.mark.parametrize("with_seal", [True, False])
async def test_keys_that_vanish_from_under_a_running_server_let_nobody_in(settings: Settings, with_seal: bool) -> None:
    database = database_of(settings)
    gate = TenantGate(database, Seal(settings.data_dir) if with_seal else None)
    assert gate.is_open
    _, text = KeyStore(database).create("acme", Role.USER)
    await gate.refresh()
    assert Seal(settings.data_dir).is_set() is with_seal
    with database.write("tenants") as session:
        session.execute(delete(KeyRow))
    await gate.refresh()
    assert not gate.is_open
    for header in (None, f"Bearer {text}"):
        with pytest.raises(AuthenticationFailed):
            gate.authenticate(header)
    database.close()


async def test_a_mark_that_cannot_be_written_is_tried_again(settings: Settings) -> None:
    database = database_of(settings)
    KeyStore(database).create("acme", Role.USER)
    blocked = settings.data_dir / "blocked"
    blocked.write_text("")
    gate = TenantGate(database, Seal(blocked))
    assert not gate.is_open
    blocked.unlink()
    await gate.refresh()
    assert Seal(blocked).is_set()
    database.close()
