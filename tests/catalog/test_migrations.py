"""The migrations make the tables that the code names, and can be undone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, inspect

from manylora.database.database import open_database
from manylora.database.tables import Base
from manylora.settings import Settings

from . import postgres
from .rig import running, sound_files


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "manylora.database:migrations")
    return config


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'registry.sqlite3'}"
        return
    cluster: postgres.Cluster = request.getfixturevalue("cluster")
    yield cluster.new_database()


@pytest.fixture
def migrated(url: str) -> Iterator[Engine]:
    open_database(url).close()
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    yield engine
    engine.dispose()


def test_the_tables_are_those_of_the_code(migrated: Engine) -> None:
    with migrated.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_opening_again_changes_nothing(url: str, migrated: Engine) -> None:
    with migrated.connect() as connection:
        before = MigrationContext.configure(connection).get_current_revision()
    open_database(url).close()
    with migrated.connect() as connection:
        assert MigrationContext.configure(connection).get_current_revision() == before
    assert before == ScriptDirectory.from_config(_config()).get_current_head()


def test_every_step_can_be_undone_and_done_again(migrated: Engine) -> None:
    config = _config()
    for _ in range(2):
        for change, target in ((command.downgrade, "base"), (command.upgrade, "head")):
            with migrated.begin() as connection:
                config.attributes["connection"] = connection
                change(config, target)
            tables = set(inspect(migrated).get_table_names()) - {"alembic_version"}
            assert tables == (set(Base.metadata.tables) if target == "head" else set())


@pytest.mark.anyio
async def test_what_was_there_before_is_counted_and_known(url: str, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", database_url=url, max_adapter_size=4 * 2**20)
    async with running(settings, "acme:manager", "ops:admin") as rig:
        for name, who in (("x", "acme:manager"), ("y", "acme:manager"), ("z", "ops:admin")):
            await rig.push(name, sound_files(1.0), who, pinned="true")
        await rig.push("x", sound_files(2.0), "acme:manager")
        await rig.call("DELETE", "/v1/adapters/y", "acme:manager")
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    config = _config()
    for change, target in ((command.downgrade, "0003"), (command.upgrade, "head")):
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            change(config, target)
    engine.dispose()
    async with running(settings) as rig:
        rig.catalog.check_integrity()
        await rig.gate.refresh()
        assert not rig.gate.is_open
