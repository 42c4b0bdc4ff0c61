"""`/v1/tenants` and `/v1/keys`: what admins do over HTTP, and what nobody else may."""

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner

from manylora.cli.main import build
from manylora.database import notices
from manylora.errors import Unavailable
from manylora.settings import Settings
from manylora.tenants.interface import Role
from manylora.tenants.keys import KeyStore
from tests.catalog.rig import Rig, running, sound_files

pytestmark = pytest.mark.anyio
OPS = "ops:admin"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", max_adapter_size=4 * 2**20)


async def _with_key(rig: Rig, text: str, path: str = "/v1/models") -> int:
    headers = {"authorization": f"Bearer {text}"}
    answer: httpx2.Response = await rig.client.get(path, headers=headers)
    return answer.status_code


async def test_a_key_is_made_shown_once_used_and_revoked(settings: Settings) -> None:
    async with running(settings, OPS) as rig:
        made = await rig.call("POST", "/v1/keys", OPS, json={"tenant": "acme", "role": "manager", "name": "CI"})
        assert (made.status_code, made.headers["cache-control"]) == (201, "no-store")
        key = made.json()
        text = key.pop("key")
        facts = {name: key[name] for name in ("object", "tenant", "role", "name", "status", "expires", "revoked")}
        assert facts == {
            "object": "key", "tenant": "acme", "role": "manager", "name": "CI", "status": "valid", "expires": None,
            "revoked": None,
        }  # fmt: skip
        assert text.startswith(f"{key['prefix']}_")
        assert await _with_key(rig, text) == 200
        path = f"/v1/keys/{key['id']}"
        assert {**(await rig.call("GET", path, OPS)).json(), "last_used": None} == key
        assert text not in (await rig.call("GET", "/v1/keys", OPS)).text
        for _ in range(2):
            revoked = await rig.call("DELETE", path, OPS)
            assert (revoked.status_code, revoked.json()["status"]) == (200, "revoked")
            assert await _with_key(rig, text) == 401, "at once, on the server that was asked"
        assert (await rig.call("DELETE", f"/v1/keys/{key['prefix']}", OPS)).status_code == 404
        log = (await rig.call("GET", "/v1/audit?tenant=acme", OPS)).json()["data"]
        assert [(change["kind"], change["name"], change["action"]) for change in log] == [
            ("key", key["id"], "revoke"),
            ("key", key["id"], "create"),
        ]
        assert log[0]["by"]["tenant"] == "ops"


async def test_a_key_ends_by_itself(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(settings, OPS) as rig:
        end = int(time.time()) + 3600
        made = (await rig.call("POST", "/v1/keys", OPS, json={"tenant": "acme", "expires": end})).json()
        assert (made["role"], made["expires"]) == ("user", end)
        assert await _with_key(rig, made["key"]) == 200
        monkeypatch.setattr("manylora.tenants.keys.time.time_ns", lambda: end * 10**9)
        assert await _with_key(rig, made["key"]) == 401
        assert (await rig.call("GET", f"/v1/keys/{made['id']}", OPS)).json()["status"] == "expired"
        assert (await rig.call("GET", "/v1/tenants/acme", OPS)).json()["num_keys"] == 0
        late = await rig.call("POST", "/v1/keys", OPS, json={"tenant": "acme", "expires": end})
        assert (late.status_code, late.json()["error"]["param"]) == (400, "expires")


async def test_keys_come_in_pages_newest_first(settings: Settings) -> None:
    async with running(settings, OPS) as rig:
        for number in range(5):
            KeyStore(rig.catalog.database).create("acme" if number % 2 else "rival", Role.USER, name=str(number))

        async def names(query: str) -> list[str]:
            seen, after = list[str](), ""
            while True:
                page = (await rig.call("GET", f"/v1/keys?limit=2{query}{after}", OPS)).json()
                seen += [key["name"] for key in page["data"]]
                if not page["has_more"]:
                    return seen
                after = f"&after={page['last_id']}"

        assert await names("") == ["4", "3", "2", "1", "0", ""]
        assert await names("&tenant=acme") == ["3", "1"]
        assert (await rig.call("GET", "/v1/keys?after=key_0", OPS)).status_code == 400


async def test_the_first_key_of_an_open_server_is_an_admins(settings: Settings) -> None:
    async with running(settings) as rig:
        refused = await rig.call("POST", "/v1/keys", json={"tenant": "acme"})
        assert (refused.status_code, rig.gate.is_open) == (409, True)
        made = await rig.call("POST", "/v1/keys", json={"tenant": "ops", "role": "admin"})
        assert (made.status_code, rig.gate.is_open) == (201, False)
        assert (await rig.call("GET", "/v1/keys")).status_code == 401
        assert await _with_key(rig, made.json()["key"], "/v1/keys") == 200


def _command(settings: Settings, *words: str) -> str:
    """What `manylora keys …` prints, run on the data folder of a server that runs."""
    done = CliRunner().invoke(build(), ["keys", *words, "--data-dir", str(settings.data_dir)])
    assert done.exit_code == 0, done.output
    return done.stdout.strip()


async def test_the_first_key_of_the_command_holds_when_the_command_returns(settings: Settings) -> None:
    async with running(settings) as rig:
        assert (await rig.call("GET", "/v1/models")).status_code == 200
        text = _command(settings, "create", "--tenant", "ops", "--role", "admin")
        assert (await rig.call("GET", "/v1/models")).status_code == 401
        assert await _with_key(rig, text) == 200


async def test_a_first_key_that_cannot_be_read_yet_closes_the_server(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise Unavailable("away")

    async with running(settings) as rig:
        text = _command(settings, "create", "--tenant", "ops", "--role", "admin")
        with monkeypatch.context() as patch:
            patch.setattr(rig.gate.key_store, "changed", fail)
            assert (await rig.call("GET", "/v1/models")).status_code == 401
        await rig.gate.refresh()
        assert await _with_key(rig, text) == 200


async def test_whatever_else_the_command_changes_holds_after_the_next_look(settings: Settings) -> None:
    assert notices._POLL_S == 1.0, "docs/operations.md says so"

    async def until(text: str, status: int) -> None:
        async with asyncio.timeout(30):
            while await _with_key(rig, text) != status:
                await asyncio.sleep(0.05)

    async with running(settings, OPS) as rig:
        text = _command(settings, "create", "--tenant", "acme")
        await until(text, 200)
        _command(settings, "revoke", text)
        await until(text, 401)


async def test_shares_and_quotas_are_set_and_hold_at_once(settings: Settings) -> None:
    async with running(settings, OPS, "acme:manager") as rig:

        async def change(**body: Any) -> dict[str, Any]:
            answer = await rig.call("PATCH", "/v1/tenants/acme", OPS, json=body)
            assert answer.status_code == 200, answer.text
            found: dict[str, Any] = answer.json()
            return found

        set_ = await change(weight=2, max_adapters=1, requests_per_minute=600)
        assert (set_["weight"], set_["max_adapters"], set_["tokens_per_minute"]) == (2.0, 1, None)
        await rig.push("x", who="acme:manager", pinned="true")
        assert (await rig.push("y", sound_files(2.0), "acme:manager")).status_code == 429
        lifted = await change(max_adapters=None)
        assert (lifted["max_adapters"], lifted["requests_per_minute"], lifted["num_keys"]) == (None, 600, 1)
        size = (await rig.call("GET", "/v1/adapters/x", "acme:manager")).json()["size_bytes"]
        assert lifted["kept"] == {"adapters": 1, "pinned": 1, "adapter_bytes": size}
        assert (await rig.push("y", sound_files(2.0), "acme:manager")).status_code == 201
        await change(requests_per_minute=0)
        assert (
            await rig.call("POST", "/v1/completions", "acme:manager", json={"model": "x", "prompt": "hi"})
        ).status_code == 429
        await change(requests_per_minute=0)
        changes = (await rig.call("GET", "/v1/audit?tenant=acme", OPS)).json()["data"]
        quotas = [change["fields"] for change in changes if change["kind"] == "tenant"]
        assert quotas == [["requests_per_minute"], ["max_adapters"], ["max_adapters", "requests_per_minute", "weight"]]


async def test_tenants_come_in_pages_by_name(settings: Settings) -> None:
    async with running(settings, OPS, "keyed:user", "stores:manager") as rig:
        await rig.push("x", who="stores:manager")
        await rig.call("PATCH", "/v1/tenants/prepared", OPS, json={"weight": 0.5})
        first = (await rig.call("GET", "/v1/tenants?limit=2", OPS)).json()
        rest = (await rig.call("GET", f"/v1/tenants?after={first['last_id']}", OPS)).json()
        names = [tenant["name"] for page in (first, rest) for tenant in page["data"]]
        assert (names, first["has_more"], rest["has_more"]) == (["keyed", "ops", "prepared", "stores"], True, False)
        assert (await rig.call("GET", "/v1/tenants/nobody", OPS)).status_code == 404


BAD: list[tuple[str, str, Any, str | None]] = [
    ("POST", "/v1/keys", {"tenant": "Not a tenant"}, "tenant"),
    ("POST", "/v1/keys", {"tenant": "acme", "role": "owner"}, "role"),
    ("POST", "/v1/keys", {"tenant": "acme", "name": "x" * 101}, "name"),
    ("POST", "/v1/keys", {"tenant": "acme", "name": "two\nlines"}, "name"),
    ("POST", "/v1/keys", {"tenant": "acme", "expires": 1}, "expires"),
    ("PATCH", "/v1/tenants/acme", {"max_pinned": -1}, "max_pinned"),
    ("PATCH", "/v1/tenants/acme", {"weight": 0}, "weight"),
    ("PATCH", "/v1/tenants/acme", {"weight": None}, "weight"),
    ("PATCH", "/v1/tenants/acme", {"weights": 1}, "weights"),
    ("PATCH", "/v1/tenants/acme", {}, None),
    ("PATCH", "/v1/tenants/No", {"weight": 1}, "tenant"),
    ("GET", "/v1/keys?limit=1001", None, "limit"),
    ("GET", "/v1/tenants?limit=0", None, "limit"),
]
ROUTES = (
    ("GET", "/v1/keys"), ("POST", "/v1/keys"), ("GET", "/v1/keys/key_0"), ("DELETE", "/v1/keys/key_0"),
    ("GET", "/v1/tenants"), ("GET", "/v1/tenants/acme"), ("PATCH", "/v1/tenants/acme"),
)  # fmt: skip


async def test_bad_requests_name_what_is_wrong_and_only_admins_get_in(settings: Settings) -> None:
    async with running(settings, OPS, "acme:manager") as rig:
        for method, path, body, param in BAD:
            answer = await rig.call(method, path, OPS, json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), (path, body)
        for method, path in ROUTES:
            statuses = [(await rig.call(method, path, who, json={})).status_code for who in ("acme:manager", None)]
            assert statuses == [403, 401], (method, path)
