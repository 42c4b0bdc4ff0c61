"""What an upload's effect probe runs is on the bill of the tenant that uploads, before the upload is answered."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from manylora.database.tables import UsageRow
from manylora.engine.interface import Effect
from manylora.settings import Settings
from manylora.tenants.limits import TenantStore
from tests.catalog.rig import CatalogEngine, Rig, running, sound_files, write_sound

pytestmark = pytest.mark.anyio
KEYS = ("ops:admin", "acme:manager", "rival:manager")
PROBED = 16  # tokens: the engine's effect says 8, once with the adapter and once without


def bill(rig: Rig) -> dict[tuple[str, str, str], tuple[int, int]]:
    """Requests and prompt tokens, as the database has them: by tenant, owner and adapter."""
    with rig.catalog.database.read() as session:
        rows = session.scalars(select(UsageRow))
        return {(row.tenant, row.owner, row.adapter): (row.requests, row.prompt_tokens) for row in rows}


async def test_who_uploads_is_charged(settings: Settings) -> None:
    async with running(settings, *KEYS) as rig:
        assert (await rig.push("mine", who="acme:manager")).status_code == 201
        assert bill(rig) == {("acme", "acme", "mine"): (0, PROBED)}
        assert (await rig.push("mine", who="acme:manager")).status_code == 200
        assert bill(rig) == {("acme", "acme", "mine"): (0, PROBED)}, "what is there already is not run again"
        assert rig.engine.payers == [("acme", 1.0)]


async def test_an_upload_for_another_tenant_is_at_the_expense_of_who_sends_it(settings: Settings) -> None:
    async with running(settings, *KEYS) as rig:
        files = [("files", (name, data)) for name, data in sound_files().items()]
        answer = await rig.call(
            "POST", "/v1/adapters", "ops:admin", params={"tenant": "rival"}, data={"name": "theirs"}, files=files
        )
        assert answer.status_code == 201
        assert bill(rig) == {("ops", "rival", "theirs"): (0, PROBED)}
        assert rig.engine.payers == [("ops", 1.0)]


async def test_a_tenant_with_a_weight_is_tried_with_it(settings: Settings) -> None:
    async with running(settings, *KEYS) as rig:
        TenantStore(rig.catalog.database).change("acme", weight=2.5)
        await rig.gate.refresh()
        assert (await rig.push("mine", who="acme:manager")).status_code == 201
        assert rig.engine.payers == [("acme", 2.5)]


async def test_an_upload_that_is_refused_for_its_effect_was_run_and_is_charged(settings: Settings) -> None:
    async with running(settings, *KEYS, engine=CatalogEngine(effect=Effect(8, 0.0, 0.0))) as rig:
        assert (await rig.push("idle", who="rival:manager")).status_code == 422
        assert bill(rig) == {("rival", "rival", "idle"): (0, PROBED)}


async def test_what_the_operator_registers_is_charged_to_nobody(settings: Settings, tmp_path: Path) -> None:
    write_sound(tmp_path / "shared" / "greeting")
    async with running(settings, *KEYS) as rig:
        (done,) = await rig.catalog.register_folder(tmp_path / "shared")
        assert done.is_new
        assert bill(rig) == {}
        assert rig.engine.payers == [("public", 1.0)]


async def test_usage_counts_its_tokens_and_no_request(settings: Settings) -> None:
    async with running(settings, *KEYS) as rig:
        await rig.push("mine", who="acme:manager")
        found: dict[str, Any] = (await rig.call("GET", "/v1/usage", "acme:manager")).json()
        (row,) = found["data"]
        assert (row["adapter"], row["requests"], row["outcomes"]) == ("mine", 0, {})
        assert row["prompt_tokens"] == found["total"]["prompt_tokens"] == PROBED
        text = (await rig.call("GET", "/metrics", "ops:admin")).text
        assert f'manylora_prompt_tokens_total{{adapter="mine",tenant="acme"}} {PROBED}.0' in text
