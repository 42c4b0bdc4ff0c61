"""Quotas of what a tenant keeps: adapters, their bytes, and pinned slots, used up and given back."""

import asyncio

import httpx2
import pytest

from manylora.errors import QuotaExceeded
from manylora.settings import Settings
from manylora.tenants.limits import TenantStore

from .rig import Rig, running, sound_files

pytestmark = pytest.mark.anyio
ACME, RIVAL = "acme:manager", "rival:manager"


def _limit(rig: Rig, **limits: int | None) -> None:
    TenantStore(rig.catalog.database).change("acme", **limits)


def _refusal(answer: httpx2.Response) -> str:
    """The message of a 429 of quota_exceeded."""
    assert answer.status_code == 429, answer.text
    error = answer.json()["error"]
    assert error["code"] == QuotaExceeded.code
    return str(error["message"])


async def test_bytes_run_out_and_come_back_with_a_deletion(settings: Settings) -> None:
    async with running(settings, ACME, RIVAL) as rig:
        first = (await rig.push("x", who=ACME)).json()
        size = first["size_bytes"]
        _limit(rig, max_adapter_bytes=2 * size - 1)
        before = rig.stored()
        for name in ("x", "y"):
            message = _refusal(await rig.push(name, sound_files(2.0), who=ACME))
            assert f"{size} kept and {size} new, of {2 * size - 1}" in message
        assert rig.stored() == before
        assert (await rig.push("x", who=ACME)).json()["id"] == first["id"]  # the same content costs nothing
        assert (await rig.push("y", sound_files(2.0), who=RIVAL)).status_code == 201
        await rig.call("DELETE", "/v1/adapters/x", ACME)
        await rig.settle()
        assert (await rig.push("y", sound_files(2.0), who=ACME)).status_code == 201
        rig.catalog.check_integrity()


async def test_cards_count_among_the_bytes(settings: Settings) -> None:
    async with running(settings, ACME) as rig:
        size = (await rig.push("x", {**sound_files(), "README.md": b"# x\n"}, ACME)).json()["size_bytes"]
        _limit(rig, max_adapter_bytes=2 * size + 10)
        longer = {**sound_files(), "README.md": b"# x\n" + b"y" * (size + 7)}
        assert f"{size + 4} kept and {size + 7} new" in _refusal(await rig.push("x", longer, who=ACME))
        assert (await rig.call("GET", "/v1/adapters/x/versions/1/card", ACME)).json()["text"] == "# x\n"
        with_card = {**sound_files(2.0), "README.md": b"# two\n" + b"y"}
        assert f"{size + 4} kept and {size + 7} new" in _refusal(await rig.push("x", with_card, who=ACME))
        assert (await rig.push("x", {**sound_files(2.0), "README.md": b"# two\n"}, who=ACME)).status_code == 201
        rig.catalog.check_integrity()


async def test_pinned_slots_run_out_and_come_back(settings: Settings) -> None:
    async with running(settings, ACME, RIVAL) as rig:
        _limit(rig, max_pinned=1)
        for number, name in enumerate(("x", "y"), 1):
            await rig.push(name, sound_files(float(number)), who=ACME)
        pin = {"pinned": True}
        assert (await rig.call("PATCH", "/v1/adapters/x", ACME, json=pin)).status_code == 200
        assert "1 of 1" in _refusal(await rig.call("PATCH", "/v1/adapters/y", ACME, json=pin))
        assert "1 of 1" in _refusal(await rig.push("z", sound_files(3.0), who=ACME, pinned="true"))
        assert (await rig.call("GET", "/v1/adapters/z", ACME)).status_code == 404
        assert (await rig.call("GET", "/v1/adapters/y", ACME)).json()["pinned"] is False
        # A pinned adapter may be promoted and pinned again: it has its slot.
        assert (await rig.push("x", sound_files(4.0), who=ACME, pinned="true", activate="true")).status_code == 201
        assert (await rig.call("PATCH", "/v1/adapters/x", ACME, json=pin)).status_code == 200
        assert [ref.label for ref in rig.engine.pinned.values()] == ["x@2"]
        assert (await rig.push("w", sound_files(5.0), who=RIVAL, pinned="true")).json()["pinned"] is True
        await rig.call("PATCH", "/v1/adapters/x", ACME, json={"pinned": False})
        assert (await rig.call("PATCH", "/v1/adapters/y", ACME, json=pin)).status_code == 200
        rig.catalog.check_integrity()


@pytest.mark.parametrize("what", ["max_adapters", "max_adapter_bytes"])
async def test_uploads_at_once_get_no_more_than_the_quota_between_them(settings: Settings, what: str) -> None:
    async with running(settings, ACME) as rig:
        size = (await rig.push("first", who=ACME)).json()["size_bytes"]
        _limit(rig, **{what: {"max_adapters": 3, "max_adapter_bytes": 3 * size}[what]})
        answers = await asyncio.gather(*(rig.push(f"n{n}", sound_files(n + 2.0), who=ACME) for n in range(6)))
        assert sorted(answer.status_code for answer in answers) == [201, 201, 429, 429, 429, 429]
        listed = (await rig.call("GET", "/v1/adapters", ACME)).json()["data"]
        assert len(listed) == 3
        rig.catalog.check_integrity()
