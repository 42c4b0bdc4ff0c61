"""What a tenant can learn of another's adapters: nothing, by any form of their names."""

from typing import Any

import httpx2
import pytest

from manylora.settings import Settings

from .rig import Rig, running, sound_files

pytestmark = pytest.mark.anyio

KEYS = ("acme:manager", "acme:user", "rival:manager", "rival:user", "public:manager", "ops:admin")


def _same(foreign: httpx2.Response, missing: httpx2.Response, name: str, other: str) -> None:
    """Byte for byte but for the request's id, the date, and the name as the caller wrote it."""
    assert foreign.content.replace(name.encode(), other.encode()) == missing.content
    assert foreign.status_code == missing.status_code
    for headers in (foreign.headers, missing.headers):
        del headers["x-request-id"]
    assert foreign.headers.items() == missing.headers.items()


ROUTES: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "/v1/adapters/{}", {}),
    ("GET", "/v1/adapters/{}?tenant=acme", {}),
    ("GET", "/v1/adapters/{}/versions/1", {}),
    ("GET", "/v1/adapters/{}/versions/1?tenant=acme", {}),
    ("GET", "/v1/adapters/{}/versions/1/download", {}),
    ("GET", "/v1/adapters/{}/versions/1/card", {}),
    ("PATCH", "/v1/adapters/{}", {"json": {"active_version": 1}}),
    ("PATCH", "/v1/adapters/{}?tenant=acme", {"json": {"pinned": True}}),
    ("DELETE", "/v1/adapters/{}", {}),
    ("DELETE", "/v1/adapters/{}/versions/1", {}),
    ("DELETE", "/v1/adapters/{}?tenant=acme", {}),
]


@pytest.mark.parametrize(("method", "path", "kwargs"), ROUTES)
@pytest.mark.parametrize("who", ["rival:manager", "rival:user", "public:manager"])
async def test_a_foreign_adapter_is_answered_like_a_missing_one(
    settings: Settings, who: str, method: str, path: str, kwargs: dict[str, Any]
) -> None:
    async with running(settings, *KEYS) as rig:
        await rig.push("secret", who="acme:manager")
        foreign = await rig.call(method, path.format("secret"), who, **kwargs)
        missing = await rig.call(method, path.format("absent"), who, **kwargs)
        assert foreign.status_code in (403, 404)
        _same(foreign, missing, "secret", "absent")
        assert (await rig.call("GET", "/v1/adapters/secret", "acme:user")).status_code == 200


NAMINGS = [
    {"model": "{}"},
    {"model": "{}@1"},
    {"model": "base-model:{}"},
    {"model": "base-model:{}@1"},
    {"model": "base-model", "adapter_id": "{}"},
    {"adapter_id": "{}@1"},
]


@pytest.mark.parametrize("naming", NAMINGS)
async def test_a_foreign_adapter_cannot_be_used_by_any_form_of_its_name(
    settings: Settings, naming: dict[str, str]
) -> None:
    async with running(settings, *KEYS) as rig:
        await rig.push("secret", who="acme:manager")

        async def complete(who: str, name: str) -> httpx2.Response:
            body = {"prompt": "hi", **{key: value.format(name) for key, value in naming.items()}}
            return await rig.call("POST", "/v1/completions", who, json=body)

        assert (await complete("acme:user", "secret")).status_code == 200
        foreign, missing = await complete("rival:user", "secret"), await complete("rival:user", "absent")
        assert foreign.status_code == 404
        _same(foreign, missing, "secret", "absent")


async def test_lists_show_own_and_public_adapters_only(settings: Settings) -> None:
    async with running(settings, *KEYS) as rig:
        await rig.push("own", who="acme:manager")
        await rig.push("shared", who="public:manager")

        async def listed(who: str) -> tuple[set[str], set[str]]:
            adapters = (await rig.call("GET", "/v1/adapters", who)).json()["data"]
            models = (await rig.call("GET", "/v1/models", who)).json()["data"]
            return {a["name"] for a in adapters}, {m["id"] for m in models} - {"base-model"}

        assert await listed("acme:user") == ({"own", "shared"}, {"own", "shared"})
        assert await listed("rival:user") == ({"shared"}, {"shared"})
        assert (await listed("ops:admin"))[0] == {"own", "shared"}
        assert (await rig.call("GET", "/v1/adapters?tenant=acme", "rival:user")).json()["data"] == []


async def test_a_foreign_adapters_id_opens_no_page(settings: Settings) -> None:
    async with running(settings, *KEYS) as rig:
        await rig.push("secret", who="acme:manager")
        adapter_id = (await rig.call("GET", "/v1/adapters/secret", "acme:user")).json()["id"]
        foreign = await rig.call("GET", f"/v1/adapters?after={adapter_id}", "rival:user")
        missing = await rig.call("GET", "/v1/adapters?after=adapter_0", "rival:user")
        _same(foreign, missing, adapter_id, "adapter_0")


async def test_two_tenants_may_use_one_name(settings: Settings) -> None:
    async with running(settings, *KEYS) as rig:
        for who, seed in (("acme:manager", 1.0), ("rival:manager", 2.0), ("public:manager", 3.0)):
            assert (await rig.push("x", sound_files(seed), who)).status_code == 201
        digests = {
            who: (await rig.call("GET", "/v1/adapters/x/versions/1", who)).json()["digest"]
            for who in ("acme:user", "rival:user", "public:manager")
        }
        assert len(set(digests.values())) == 3
        await rig.call("DELETE", "/v1/adapters/x", "acme:manager")
        shared = (await rig.call("GET", "/v1/adapters/x/versions/1", "acme:user")).json()
        assert (shared["tenant"], shared["digest"]) == ("public", digests["public:manager"])


async def test_everybodys_adapter_is_changed_by_its_own_managers_and_admins_only(settings: Settings) -> None:
    async with running(settings, *KEYS) as rig:
        await rig.push("shared", who="public:manager")
        for method, path, body in (
            ("PATCH", "/v1/adapters/shared", {"description": "mine"}),
            ("DELETE", "/v1/adapters/shared", None),
            ("DELETE", "/v1/adapters/shared/versions/1", None),
        ):
            assert (await rig.call(method, path, "acme:manager", json=body)).status_code == 403
        assert (await rig.call("DELETE", "/v1/adapters/shared", "ops:admin")).status_code == 204


async def test_roles_are_held_to(settings: Settings) -> None:
    async with running(settings, *KEYS) as rig:
        await rig.push("x", who="acme:manager")
        assert (await rig.push("y", who="acme:user")).status_code == 403
        for method, path in (
            ("PATCH", "/v1/adapters/x"),
            ("DELETE", "/v1/adapters/x"),
            ("GET", "/v1/adapters/x/versions/1/download"),
        ):
            answer = await rig.call(method, path, "acme:user", json={"pinned": True})
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_role")
        importing = {"name": "z", "source": "file:///x"}
        assert (await rig.call("POST", "/v1/adapters", "acme:manager", json=importing)).status_code == 403
        for route in ("load", "unload"):
            body = {"lora_name": "x", "lora_path": "/x"}
            answer = await rig.call("POST", f"/v1/{route}_lora_adapter", "acme:manager", json=body)
            assert answer.status_code == 403


async def test_without_a_key_nothing_is_answered(settings: Settings) -> None:
    async with running(settings, *KEYS) as rig:
        for method, path, _ in ROUTES:
            answer = await rig.client.request(method, path.format("x"))
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        wrong = {"authorization": "Bearer ml_000000000000_" + "x" * 43}
        assert (await rig.client.get("/v1/adapters", headers=wrong)).status_code == 401


async def test_an_admin_reaches_every_tenants_adapters(settings: Settings) -> None:
    async with running(settings, *KEYS) as rig:
        await rig.push("x", who="acme:manager")
        assert (await rig.call("GET", "/v1/adapters/x", "ops:admin")).json()["tenant"] == "acme"
        await rig.push("x", sound_files(2.0), "rival:manager")
        assert (await rig.call("GET", "/v1/adapters/x", "ops:admin")).status_code == 409
        assert (await rig.call("DELETE", "/v1/adapters/x?tenant=rival", "ops:admin")).status_code == 204
        assert (await rig.call("GET", "/v1/adapters/x", "rival:user")).status_code == 404
        answer = await _push_for(rig, "ops:admin", "rival")
        assert (answer.status_code, answer.json()["tenant"]) == (201, "rival")
        assert (await _push_for(rig, "acme:manager", "rival")).status_code == 403


async def _push_for(rig: Rig, who: str, tenant: str) -> httpx2.Response:
    parts = [("files", (file, data)) for file, data in sound_files(5.0).items()]
    return await rig.call("POST", f"/v1/adapters?tenant={tenant}", who, data={"name": "given"}, files=parts)


@pytest.mark.parametrize("n", ["0", "-1", "1.0", "x", "01", "99999999999999999999", "1e3", "١"])
async def test_what_is_no_version_number_is_a_missing_version(settings: Settings, n: str) -> None:
    async with running(settings) as rig:
        await rig.push("x")
        for path in (f"/v1/adapters/x/versions/{n}", f"/v1/adapters/x/versions/{n}/download"):
            assert (await rig.call("GET", path)).json()["error"]["code"] == "adapter_not_found"
