"""What was changed of an adapter, by whom and when; the way back; and which version an upload makes the active one."""

from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine

from manylora.settings import Settings

from .rig import Rig, running, sound_files

pytestmark = pytest.mark.anyio
ACME, RIVAL, OPS = "acme:manager", "rival:manager", "ops:admin"


async def _changes(rig: Rig, name: str, who: str | None = None, **params: int) -> list[dict[str, Any]]:
    answer = await rig.call("GET", f"/v1/adapters/{name}/history", who, params=params)
    assert answer.status_code == 200, answer.text
    data: list[dict[str, Any]] = answer.json()["data"]
    return data


async def _told(rig: Rig, name: str, who: str | None = None) -> list[tuple[Any, ...]]:
    """Oldest first: what was done with which version, and what was active before and after."""
    facts = ("action", "version", "from_version", "to_version")
    return [tuple(change[fact] for fact in facts) for change in reversed(await _changes(rig, name, who))]


async def _active(rig: Rig, name: str, who: str | None = None) -> int | None:
    number: int | None = (await rig.call("GET", f"/v1/adapters/{name}", who)).json()["active_version"]
    return number


async def test_only_the_first_version_of_a_name_becomes_active_unasked(settings: Settings) -> None:
    async with running(settings) as rig:
        first = (await rig.push("x")).json()
        further = (await rig.push("x", sound_files(2.0))).json()
        assert (first["active"], first["active_version"]) == (True, 1)
        assert (further["version"], further["active"], further["active_version"]) == (2, False, 1)
        again = (await rig.push("x", sound_files(2.0))).json()
        assert (again["version"], again["active_version"]) == (2, 1), "the same content again leaves it, too"
        asked = (await rig.push("x", sound_files(2.0), activate="true")).json()
        assert (asked["version"], asked["active_version"]) == (2, 2)
        assert (await rig.push("y", activate="false")).json()["active_version"] is None
        assert (await rig.push("y", sound_files(2.0))).json()["active_version"] is None
        await rig.call("DELETE", "/v1/adapters/x")
        assert (await rig.push("x", sound_files(3.0))).json()["active_version"] == 3, "the name begins anew"


async def test_each_change_says_who_made_it_and_what_was_active(settings: Settings) -> None:
    async with running(settings, ACME, OPS) as rig:
        await rig.push("x", who=ACME, note="from the nightly run")
        await rig.push("x", sound_files(2.0), ACME)
        await rig.call("PATCH", "/v1/adapters/x", OPS, json={"active_version": 2, "pinned": True, "note": "asked for"})
        await rig.call("PATCH", "/v1/adapters/x", OPS, json={"active_version": 2, "pinned": True})
        await rig.call("PATCH", "/v1/adapters/x", ACME, json={"defaults": {"temperature": 0}, "description": "d"})
        await rig.call("DELETE", "/v1/adapters/x/versions/1", ACME)
        assert await _told(rig, "x", ACME) == [
            ("upload", 1, None, 1), ("upload", 2, None, None), ("promote", 2, 1, 2), ("change", 2, None, None),
            ("delete", 1, None, None),
        ]  # fmt: skip
        deleted, changed, promoted, _, uploaded = await _changes(rig, "x", ACME)
        assert (uploaded["note"], promoted["note"], promoted["fields"]) == (
            "from the nightly run",
            "asked for",
            ["pinned"],
        )
        assert changed["fields"] == ["defaults", "description"]
        key = uploaded["by"]["key_id"]
        assert uploaded["by"] == {"role": "manager", "tenant": "acme", "key_id": key}
        assert key.startswith("key_")
        assert deleted["by"]["key_id"] == key
        assert promoted["by"] == {"role": "admin", "tenant": None, "key_id": None}, "whose it is, is the operator's"
        (told,) = [change for change in await _changes(rig, "x", OPS) if change["action"] == "promote"]
        assert told["by"]["tenant"] == "ops"


async def test_a_history_comes_in_pages_newest_first(settings: Settings) -> None:
    async with running(settings) as rig:
        await rig.push("x")
        for number in range(4):
            await rig.call("PATCH", "/v1/adapters/x", json={"description": str(number)})
        seen, before = [], None
        while True:
            params = {"limit": 2} | ({} if before is None else {"before": before})
            page = (await rig.call("GET", "/v1/adapters/x/history", params=params)).json()
            seen += [change["id"] for change in page["data"]]
            before = page["next_before"]
            if before is None:
                break
        assert seen == sorted(seen, reverse=True)
        assert seen == [change["id"] for change in await _changes(rig, "x")]
        assert len(seen) == 5
        for query in ("limit=0", "limit=1001", "before=0", "before=x"):
            assert (await rig.call("GET", f"/v1/adapters/x/history?{query}")).status_code == 400


async def test_rolling_back_goes_back_one_more_each_time(settings: Settings) -> None:
    async with running(settings) as rig:
        for seed in (1.0, 2.0, 3.0, 4.0):
            await rig.push("x", sound_files(seed), activate="true")

        async def back(**body: Any) -> tuple[int, Any]:
            answer = await rig.call("POST", "/v1/adapters/x/rollback", json=body)
            return answer.status_code, answer.json().get("active_version")

        assert await back(note="worse than before") == (200, 3)
        await rig.call("DELETE", "/v1/adapters/x/versions/2")
        assert await back() == (200, 1), "what is deleted is passed over"
        assert (await back())[0] == 409
        await rig.call("PATCH", "/v1/adapters/x", json={"active_version": 4})
        assert await back(if_active=3) == (409, None), "somebody else promoted meanwhile"
        assert await _active(rig, "x") == 4
        assert await back(if_active=4) == (200, 1)
        assert (await _changes(rig, "x"))[0]["action"] == "rollback"
        assert rig.catalog.directory.resolve("public", "x").version == 1
        rig.catalog.check_integrity()


async def test_a_rolled_back_pin_moves_to_the_version_that_answers(settings: Settings) -> None:
    async with running(settings) as rig:
        ids = [(await rig.push("x", sound_files(s), activate="true", pinned="true")).json()["id"] for s in (1.0, 2.0)]
        assert list(rig.engine.pinned) == [ids[1]]
        await rig.call("POST", "/v1/adapters/x/rollback", json={})
        assert list(rig.engine.pinned) == [ids[0]]


async def test_a_promotion_can_be_held_to_what_is_active(settings: Settings) -> None:
    async with running(settings) as rig:
        for seed in (1.0, 2.0, 3.0):
            await rig.push("x", sound_files(seed))
        late = await rig.call("PATCH", "/v1/adapters/x", json={"active_version": 3, "if_active": 2})
        assert (late.status_code, await _active(rig, "x")) == (409, 1)
        assert "'x@1'" in late.json()["error"]["message"]
        done = await rig.call("PATCH", "/v1/adapters/x", json={"active_version": 3, "if_active": 1})
        assert (done.status_code, await _active(rig, "x")) == (200, 3)
        alone = await rig.call("PATCH", "/v1/adapters/x", json={"if_active": 3, "note": "n"})
        assert alone.status_code == 400, "it changes nothing"
        for note in ("x" * 1025, "a\0b"):
            answer = await rig.call("PATCH", "/v1/adapters/x", json={"pinned": True, "note": note})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "note")


async def test_nobody_hears_of_another_tenants_changes(settings: Settings) -> None:
    async with running(settings, ACME, RIVAL, OPS, "acme:user", "public:manager") as rig:
        await rig.push("x", who=ACME)
        await rig.push("all", who="public:manager")
        assert (await rig.call("GET", "/v1/adapters/x/history", RIVAL)).status_code == 404
        assert (await rig.call("POST", "/v1/adapters/x/rollback", RIVAL, json={})).status_code == 404
        assert (await rig.call("GET", "/v1/adapters/all/history", ACME)).status_code == 403
        assert (await rig.call("POST", "/v1/adapters/all/rollback", ACME, json={})).status_code == 403
        assert (await rig.call("POST", "/v1/adapters/x/rollback", "acme:user", json={})).status_code == 403
        assert len(await _changes(rig, "x", "acme:user")) == 1
        assert (await rig.call("GET", "/v1/audit", ACME)).status_code == 403
        audit = (await rig.call("GET", "/v1/audit", OPS)).json()
        uploads = [(change["tenant"], change["name"]) for change in audit["data"] if change["kind"] == "adapter"]
        assert uploads == [("public", "all"), ("acme", "x")]
        await rig.call("DELETE", "/v1/adapters/x", ACME)
        of_acme = (await rig.call("GET", "/v1/audit?tenant=acme&limit=1", OPS)).json()
        assert [(change["action"], change["from_version"]) for change in of_acme["data"]] == [("delete", 1)]
        assert of_acme["next_before"] == of_acme["data"][0]["id"]


async def test_a_database_from_before_begins_with_what_is_active(settings: Settings) -> None:
    async with running(settings) as rig:
        await rig.push("x")
        await rig.push("x", sound_files(2.0), activate="true")
        await rig.push("gone")
        await rig.call("DELETE", "/v1/adapters/gone")
    engine = create_engine(settings.resolved_database_url)
    config = Config()
    config.set_main_option("script_location", "manylora.database:migrations")
    for change, target in ((command.downgrade, "0007"), (command.upgrade, "head")):
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            change(config, target)
    engine.dispose()
    async with running(settings) as rig:
        assert await _told(rig, "x") == [("begin", 2, None, 2)]
        assert [c["by"]["role"] for c in await _changes(rig, "x")] == ["server"]
        assert (await rig.call("POST", "/v1/adapters/x/rollback", json={})).status_code == 409
        await rig.call("PATCH", "/v1/adapters/x", json={"active_version": 1})
        await rig.call("POST", "/v1/adapters/x/rollback", json={})
        assert await _active(rig, "x") == 2
