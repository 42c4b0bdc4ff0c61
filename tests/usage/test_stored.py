"""Bytes stored follow uploads and deletions, also those from before usage was kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from manylora.settings import Settings
from tests.catalog.rig import Rig, running, sound_files

pytestmark = pytest.mark.anyio


async def stored(rig: Rig, **params: str) -> dict[str, int]:
    answer = await rig.call("GET", "/v1/usage", params=params)
    return {row["adapter"]: row["stored_bytes"] for row in answer.json()["data"] if row["adapter"]}


async def test_versions_count_until_they_are_deleted(tmp_path: Path) -> None:
    async with running(Settings(data_dir=tmp_path / "data")) as rig:
        size = sum(map(len, sound_files().values()))
        await rig.push("sql")
        assert await stored(rig) == {"sql": size}
        await rig.push("sql")  # the same again is no new version
        assert await stored(rig) == {"sql": size}
        await rig.push("sql", sound_files(2.0), activate="true")
        await rig.push("other")
        assert await stored(rig) == {"sql": 2 * size, "other": size}
        await rig.call("DELETE", "/v1/adapters/sql/versions/1")
        assert await stored(rig) == {"sql": size, "other": size}
        await rig.call("DELETE", "/v1/adapters/sql")
        assert await stored(rig) == {"sql": 0, "other": size}


async def test_a_refused_upload_is_not_stored(tmp_path: Path) -> None:
    async with running(Settings(data_dir=tmp_path / "data")) as rig:
        await rig.push("sql", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"})
        assert await stored(rig) == {}


def upgrade(engine: sa.Engine, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", "manylora.database:migrations")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


def engine_of(url: str) -> sa.Engine:
    return sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))


def test_versions_from_before_usage_was_kept_are_stored_since_they_were_made(database_url: str) -> None:
    engine = engine_of(database_url)
    upgrade(engine, "0001")
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO adapters (id, tenant, name, description, next_version, pinned, is_deleted, created) "
                "VALUES ('a', 'acme', 'sql', '', 3, :no, :no, 5)"
            ),
            {"no": False},
        )
        for number, at in ((1, 5), (2, 9)):
            connection.execute(sa.text(INSERT_VERSION), version(number, at))
    upgrade(engine, "head")
    with engine.begin() as connection:
        rows = connection.execute(sa.text("SELECT tenant, adapter, at, size_bytes FROM stored ORDER BY id")).all()
    engine.dispose()
    assert [tuple(row) for row in rows] == [("acme", "sql", 5, 100), ("acme", "sql", 9, 200)]


INSERT_VERSION = (
    "INSERT INTO versions (id, adapter_id, version, digest, blob, base, kind, rank, alpha, target_modules, size_bytes, "
    "report, created) VALUES (:id, 'a', :version, 'd', 'b', 'x', 'lora', 4, 1.0, :empty, 100, :report, :created)"
)


def version(number: int, at: int) -> dict[str, Any]:
    return {"id": f"v{number}", "version": number, "empty": json.dumps([]), "report": json.dumps({}), "created": at}
