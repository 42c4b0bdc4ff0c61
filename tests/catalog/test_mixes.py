"""Saved mixes: versions without files, of which each part is a version for good."""

from typing import Any

import httpx2
import pytest
from sqlalchemy import select

from manylora.database.tables import VersionRow
from manylora.engine.interface import Mix
from manylora.errors import Conflict
from manylora.serving.warm_up import to_warm_up
from manylora.settings import Settings
from manylora.tenants.limits import TenantStore

from .rig import Rig, running, sound_files

pytestmark = pytest.mark.anyio


async def save(rig: Rig, name: str, parts: dict[str, float], who: str | None = None, **fields: Any) -> httpx2.Response:
    mix = [{"name": part, "weight": weight} for part, weight in parts.items()]
    return await rig.call("POST", "/v1/adapters", who, json={"name": name, "mix": mix, **fields})


async def complete(rig: Rig, model: str, who: str | None = None) -> httpx2.Response:
    body = {"model": model, "prompt": "hi", "max_tokens": 2}
    return await rig.call("POST", "/v1/completions", who, json=body)


async def test_a_saved_mix_is_a_version_that_runs_its_parts(settings: Settings) -> None:
    async with running(settings) as rig:
        for number, name in enumerate(("sql", "tone")):
            await rig.push(name, sound_files(1.0 + number))
        answer = await save(rig, "both", {"sql": 0.7, "tone": 0.3}, description="two")
        assert answer.status_code == 201, answer.text
        version = answer.json()
        assert {key: version[key] for key in ("name", "version", "kind", "status", "active")} == {
            "name": "both", "version": 1, "kind": "mix", "status": "ready", "active": True,
        }  # fmt: skip
        assert [(part["name"], part["version"], part["weight"]) for part in version["mix"]] in (
            [("sql", 1, 0.7), ("tone", 1, 0.3)], [("tone", 1, 0.3), ("sql", 1, 0.7)],
        )  # fmt: skip
        assert version["rank"] == 2 * (await rig.call("GET", "/v1/adapters/sql")).json()["rank"]
        ran = await complete(rig, "both")
        assert ran.status_code == 200, ran.text
        assert ran.headers["x-manylora-adapter"] == "both@1"
        assert ran.json()["manylora"]["adapter"]["name"] == "both"
        assert {part["name"]: part["weight"] for part in ran.json()["manylora"]["adapters"]} == {
            "sql": 0.7,
            "tone": 0.3,
        }
        directory = rig.catalog.directory
        refs = [directory.resolve("public", name) for name in ("sql", "tone")]
        assert rig.engine.generations[-1].adapter == Mix.weighted(zip(refs, (0.7, 0.3), strict=True))
        assert "both" in {row["id"] for row in (await rig.call("GET", "/v1/models")).json()["data"]}
        assert (await rig.call("GET", "/v1/adapters/both")).json()["mix"] == version["mix"]
        assert (await rig.call("GET", "/v1/adapters/sql")).json()["mix"] is None
        rig.catalog.check_integrity()


async def test_parts_stay_the_versions_that_were_saved_and_the_mix_has_versions(settings: Settings) -> None:
    async with running(settings) as rig:
        await rig.push("sql", sound_files(1.0))
        await rig.push("tone", sound_files(2.0))
        await save(rig, "both", {"sql": 1.0, "tone": 1.0})
        await rig.push("sql", sound_files(3.0), activate="true")
        assert (await complete(rig, "both")).json()["manylora"]["adapters"][0]["version"] == 1
        again = await save(rig, "both", {"tone@1": 1.0, "sql@1": 1.0})
        assert (again.status_code, again.json()["version"]) == (200, 1), "it is that mix already"
        newer = await save(rig, "both", {"sql": 0.5, "tone": 1.0}, activate=True)
        assert (newer.status_code, newer.json()["version"]) == (201, 2)
        assert {part["version"] for part in newer.json()["mix"]} == {1, 2}
        assert (await rig.call("PATCH", "/v1/adapters/both", json={"active_version": 1})).status_code == 200
        assert (await complete(rig, "both")).headers["x-manylora-adapter"] == "both@1"
        assert (await complete(rig, "both@2")).headers["x-manylora-adapter"] == "both@2"
        await save(rig, "alias", {"sql@1": 1.0})
        assert (await complete(rig, "alias")).headers["x-manylora-adapter"] == "alias@1"
        assert rig.engine.generations[-1].adapter == rig.catalog.directory.resolve("public", "sql", 1)
        defaults = {"defaults": {"max_tokens": 1}}
        assert (await rig.call("PATCH", "/v1/adapters/both", json=defaults)).status_code == 200
        assert (await complete(rig, "both")).status_code == 200
        locked = {"defaults": {"seed": 7, "locked": ["seed"]}}
        assert (await rig.call("PATCH", "/v1/adapters/tone", json=locked)).status_code == 200
        assert (await complete(rig, "both")).status_code == 400, "what is locked is not mixed, saved or not"


async def test_a_part_is_not_deleted_from_under_a_mix(settings: Settings) -> None:
    async with running(settings) as rig:
        await rig.push("sql", sound_files(1.0))
        await rig.push("sql", sound_files(2.0), activate="true")
        await rig.push("tone", sound_files(3.0))
        await save(rig, "both", {"sql@1": 1.0, "tone": 0.5})
        for path in ("/v1/adapters/sql/versions/1", "/v1/adapters/sql", "/v1/adapters/tone", "/v1/models/tone"):
            refused = await rig.call("DELETE", path)
            assert refused.status_code == 409, path
            assert "part of the mix both@1" in refused.json()["error"]["message"]
        assert (await complete(rig, "both")).status_code == 200
        assert (await rig.call("DELETE", "/v1/adapters/both")).status_code == 204
        await rig.settle()
        for path in ("/v1/adapters/sql", "/v1/adapters/tone"):
            assert (await rig.call("DELETE", path)).status_code == 204, path
        await rig.settle()
        assert rig.stored() == []
        rig.catalog.check_integrity()


async def test_whose_parts_may_be_mixed(settings: Settings) -> None:
    """The owner's own and public ones; who deletes a public one is not told of others' mixes, nor held up by them."""
    async with running(settings, "public:admin", "acme:manager", "rival:manager", "acme:user") as rig:
        await rig.push("shared", sound_files(1.0), "public:admin")
        await rig.push("own", sound_files(2.0), "acme:manager")
        assert (await save(rig, "m", {"shared": 1.0, "own": 1.0}, "acme:manager")).status_code == 201
        assert (await save(rig, "m", {"shared": 1.0}, "acme:user")).status_code == 403
        foreign = await save(rig, "m", {"own": 1.0}, "rival:manager")
        missing = await save(rig, "m", {"nowhere": 1.0}, "rival:manager")
        assert foreign.status_code == missing.status_code == 404
        assert foreign.text.replace("own", "nowhere") == missing.text.replace("own", "nowhere")
        assert (await rig.call("DELETE", "/v1/adapters/shared", "public:admin")).status_code == 204
        assert (await complete(rig, "m", "acme:user")).status_code == 404


async def test_a_mix_without_a_part_is_as_if_it_were_not_there(settings: Settings) -> None:
    async with running(settings, "public:admin", "acme:manager") as rig:
        for name in ("part", "m"):
            await rig.push(name, sound_files(1.0), "public:admin")
        await save(rig, "m", {"part": 1.0}, "acme:manager")
        await save(rig, "alone", {"part": 1.0}, "acme:manager")
        directory = rig.catalog.directory
        assert directory.resolve("acme", "m").tenant == "acme"
        assert directory.num_usable == 4
        assert (await rig.call("DELETE", "/v1/adapters/part", "public:admin")).status_code == 204
        assert directory.num_usable == 1
        assert directory.resolve("acme", "m").tenant == "public"
        assert [each.ref.label for each in directory.visible_to("acme")] == ["m@1"]
        assert next(directory.visible_to("acme")).ref.tenant == "public"
        for name in ("m@1", "alone"):
            assert (await complete(rig, name, "acme:manager")).status_code == 404
        for path in ("m", "m/versions/1", "alone"):
            found = (await rig.call("GET", f"/v1/adapters/{path}", "acme:manager")).json()
            assert (found["tenant"], found["status"]) == ("acme", "missing_part")
        await rig.push("part", sound_files(2.0), "public:admin")
        again = await save(rig, "m", {"part": 1.0}, "acme:manager")
        assert (again.json()["version"], again.json()["active"], again.json()["status"]) == (2, True, "ready")
        assert directory.resolve("acme", "m").version == 2
        rig.catalog.check_integrity()


async def test_a_mix_takes_the_room_of_its_text(settings: Settings) -> None:
    async with running(settings, "acme:manager") as rig:
        await rig.push("sql", sound_files(1.0), "acme:manager")
        size = (await save(rig, "half", {"sql": 0.5}, "acme:manager")).json()["size_bytes"]
        with rig.catalog.database.read() as session:
            (text,) = session.execute(select(VersionRow.mix).where(VersionRow.mix != "")).scalars()
        assert size == len(text.encode())
        kept = TenantStore(rig.catalog.database).get("acme").adapter_bytes
        TenantStore(rig.catalog.database).change("acme", max_adapter_bytes=kept + size - 1)
        refused = await save(rig, "more", {"sql": 0.25}, "acme:manager")
        assert (refused.status_code, "adapter bytes" in refused.text) == (429, True)
        rig.catalog.check_integrity()


async def test_what_cannot_be_saved_is_refused(settings: Settings) -> None:
    async with running(settings, "acme:manager") as rig:
        await rig.push("sql", sound_files(1.0), "acme:manager")
        await save(rig, "half", {"sql": 0.5}, "acme:manager")
        for parts, fields, words in (
            ({"sql": 5.0}, {}, "mix[0].weight"),
            ({"sql": 0.0}, {}, "weight is not 0"),
            ({"half": 1.0}, {}, "is a mix itself"),
            ({"sql": 1.0, "sql@1": 1.0}, {}, "more than once"),
            ({}, {}, "mix"),
            ({f"a{n}": 1.0 for n in range(9)}, {}, "mix"),
            ({"sql": 1.0}, {"name": "NO"}, "'name'"),
        ):
            answer = await save(rig, **{"name": "x", "parts": parts, "who": "acme:manager", **fields})  # type: ignore[arg-type]
            assert answer.status_code == 400, answer.text
            assert words in answer.text
        nothing = await rig.call("POST", "/v1/adapters", "acme:manager", json={"name": "x"})
        assert nothing.status_code in (400, 403)
        for is_pinned, name in ((True, "x"), (True, "sql"), (False, "sql")):  # of which another version is active
            pinned = await save(rig, name, {"sql": 1.0}, "acme:manager", pinned=is_pinned, activate=False)
            assert (pinned.status_code, pinned.json()["error"]["param"]) == (409, "pinned")
            assert "Pin its adapters" in pinned.json()["error"]["message"]
        two = await save(rig, "x", {"sql": 1.0}, "acme:manager", source="file:///nowhere")
        assert (two.status_code, two.json()["error"]["param"]) == (400, "source")
        assert (await rig.call("GET", "/v1/adapters/x", "acme:manager")).status_code == 404
        download = await rig.call("GET", "/v1/adapters/half/versions/1/download", "acme:manager")
        assert download.status_code == 409
        assert "has no files" in download.json()["error"]["message"]


async def test_a_saved_mix_is_there_after_a_restart(settings: Settings) -> None:
    async with running(settings) as rig:
        await rig.push("sql", sound_files(1.0))
        saved = (await save(rig, "half", {"sql": 0.5})).json()
    async with running(settings) as rig:
        assert (await rig.call("GET", "/v1/adapters/half/versions/1")).json() == saved
        sql, half = (rig.catalog.directory.resolve("public", name) for name in ("sql", "half"))
        assert to_warm_up(rig.catalog.directory) == [sql], "what is read at the start has files"
        with pytest.raises(Conflict, match="has no files"):
            rig.catalog.local_folder(half)
        assert (await complete(rig, "half")).status_code == 200
        rig.catalog.check_integrity()


async def test_a_mix_that_is_materialised_is_an_adapter_of_its_own(settings: Settings) -> None:
    """With files, which need its parts no more; the same again is the version that is there."""
    async with running(settings) as rig:
        for number, name in enumerate(("sql", "tone")):
            await rig.push(name, sound_files(1.0 + number))
        parts = {"sql": 0.7, "tone": 0.3}
        answer = await save(rig, "both", parts, materialise="ties", density=0.4)
        assert answer.status_code == 201, answer.text
        version = answer.json()
        rank = (await rig.call("GET", "/v1/adapters/sql")).json()["rank"]
        assert (version["kind"], version["mix"], version["rank"]) == ("lora", None, rank)
        again = await save(rig, "both", parts, materialise="ties", density=0.4)
        assert (again.status_code, again.json()["version"]) == (200, 1)
        other = await save(rig, "both", parts, materialise="dare_linear", density=0.4, seed=7, activate=True)
        assert (other.status_code, other.json()["version"]) == (201, 2)
        assert other.json()["digest"] != version["digest"]
        for name in parts:
            assert (await rig.call("DELETE", f"/v1/adapters/{name}")).status_code == 204
        assert (await complete(rig, "both")).status_code == 200
        card = await rig.call("GET", "/v1/adapters/both/versions/1/card")
        assert "ties, density 0.4" in card.text
        assert "sql@1, weight 0.7" in card.text
        rig.catalog.check_integrity()


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"density": 0.5}, "materialise"), ({"seed": 3}, "materialise"), ({"materialise": "svd"}, "materialise"),
     ({"materialise": "ties", "density": 0}, "density"), ({"materialise": "ties", "density": 1.5}, "density"),
     ({"materialise": "ties", "seed": -1}, "seed")],
)  # fmt: skip
async def test_what_materialise_cannot_do_is_a_400(fields: dict[str, Any], param: str, settings: Settings) -> None:
    async with running(settings) as rig:
        await rig.push("sql", sound_files())
        answer = await save(rig, "both", {"sql": 0.5}, **fields)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param
        sent = {"name": "x", "source": "file:///x", **fields}
        assert (await rig.call("POST", "/v1/adapters", json=sent)).status_code == 400
