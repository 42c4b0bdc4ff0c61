"""Uploads that are taken: both forms, idempotence, what is stored and what is answered."""

import asyncio
import io
import json
import tarfile
import zipfile

import pytest

from manylora.engine.interface import AdapterRef, Effect
from manylora.errors import EngineDead
from manylora.settings import Settings

from .rig import CONFIG_FILE, TENSOR_FILE, running, sound_files, tar_of

pytestmark = pytest.mark.anyio


async def test_two_files_become_a_version_that_can_be_named_at_once(settings: Settings) -> None:
    async with running(settings) as rig:
        response = await rig.push("billing", description="Answers about bills")
        assert response.status_code == 201, response.text
        body = response.json()
        assert body.pop("id").startswith("version_")
        assert len(body.pop("digest")) == 64
        assert body.pop("created") > 1_600_000_000
        assert body.pop("size_bytes") == sum(len(data) for data in sound_files().values())
        assert body.pop("report")["effect"] == {"prompt_tokens": 8, "max_abs_logit_delta": 1.5, "kl": 0.25}
        assert body == {
            "object": "adapter.version",
            "name": "billing",
            "version": 1,
            "status": "ready",
            "active": True,
            "active_version": 1,
            "pinned": False,
            "tenant": "public",
            "kind": "lora",
            "rank": 4,
            "alpha": 8.0,
            "target_modules": ["q_proj", "v_proj"],
            "tier": "disk",
            "defaults": {},
            "mix": None,
            "card_bytes": 0,
            "lineage": {},
        }
        answer = await rig.call("POST", "/v1/completions", json={"model": "billing", "prompt": "hi"})
        assert answer.headers["x-manylora-adapter"] == "billing@1"
        assert (await rig.call("GET", "/v1/adapters/billing")).json()["description"] == "Answers about bills"


def _zip(prefix: str = "") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, data in sound_files().items():
            bundle.writestr(prefix + name, data)
    return out.getvalue()


@pytest.mark.parametrize(
    "archive",
    [
        pytest.param(_zip(), id="zip"),
        pytest.param(_zip("my-adapter/"), id="zip with a folder"),
        pytest.param(tar_of(sound_files(), mode="w"), id="tar"),
        pytest.param(tar_of(sound_files(), prefix="./"), id="tar.gz made of a dot"),
        pytest.param(tar_of(sound_files(), prefix="my-adapter/"), id="tar.gz with a folder"),
        pytest.param(tar_of({**sound_files(), "README.md": b"# hi"}), id="tar.gz with a card"),
    ],
)
async def test_an_archive_gives_the_same_digest_as_its_files(settings: Settings, archive: bytes) -> None:
    async with running(settings) as rig:
        from_archive = await rig.push_archive("a", archive)
        assert from_archive.status_code == 201, from_archive.text
        from_files = await rig.push("b")
        assert from_archive.json()["digest"] == from_files.json()["digest"]
        assert len(rig.stored()) == 2, "two names share one blob, and the card is not kept"


async def test_the_same_content_again_is_the_existing_version(settings: Settings) -> None:
    async with running(settings) as rig:
        first = (await rig.push("x")).json()
        again = await rig.push("x")
        assert again.status_code == 200
        assert again.json() == first
        assert len(rig.engine.probed) == 1
        assert len(rig.stored()) == 2
        assert 'uploads_total{result="unchanged",tenant="public"} 1.0' in rig.metrics.render().decode()


async def test_other_content_is_the_next_version_and_becomes_active_where_that_is_asked_for(settings: Settings) -> None:
    async with running(settings) as rig:
        await rig.push("x")
        second = (await rig.push("x", sound_files(2.0), activate="true")).json()
        assert (second["version"], second["active"]) == (2, True)


async def test_an_upload_that_is_not_activated_can_be_tried_by_number_only(settings: Settings) -> None:
    async with running(settings) as rig:
        assert (await rig.push("x", activate="false")).json()["active"] is False
        by_name = await rig.call("POST", "/v1/completions", json={"model": "x", "prompt": "hi"})
        by_number = await rig.call("POST", "/v1/completions", json={"model": "x@1", "prompt": "hi"})
        assert (by_name.status_code, by_number.status_code) == (404, 200)


async def test_content_that_is_not_the_newest_makes_a_new_version(settings: Settings) -> None:
    async with running(settings) as rig:
        for seed in (1.0, 2.0, 1.0):
            response = await rig.push("x", sound_files(seed))
        assert (response.status_code, response.json()["version"]) == (201, 3)
        assert len(rig.stored()) == 4


async def test_same_content_in_other_bytes_shares_the_digest_and_keeps_its_bytes(settings: Settings) -> None:
    spaced = sound_files()
    spaced[CONFIG_FILE] = json.dumps(json.loads(spaced[CONFIG_FILE]), indent=4).encode()
    async with running(settings) as rig:
        first, other = (await rig.push("a")).json(), (await rig.push("b", spaced)).json()
        assert first["digest"] == other["digest"]
        for name, files in (("a", sound_files()), ("b", spaced)):
            data = (await rig.call("GET", f"/v1/adapters/{name}/versions/1/download")).content
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                for file in (CONFIG_FILE, TENSOR_FILE):
                    member = tar.extractfile(file)
                    assert member is not None
                    assert member.read() == files[file]


async def test_a_download_uploads_again_as_the_same_version(settings: Settings) -> None:
    async with running(settings) as rig:
        first = (await rig.push("x")).json()
        download = await rig.call("GET", "/v1/adapters/x/versions/1/download")
        assert download.headers["content-disposition"] == 'attachment; filename="x-1.tar.gz"'
        again = await rig.push_archive("x", download.content)
        assert (again.status_code, again.json()["id"]) == (200, first["id"])


async def test_what_was_validated_is_tried_and_left_to_the_version_that_it_became(settings: Settings) -> None:
    async with running(settings) as rig:
        version = (await rig.push("x")).json()
        ((ref, adapter),) = rig.engine.probed
        assert adapter.digest == ref.digest == version["digest"]
        assert ref.id != version["id"]
        assert rig.engine.forgotten == [ref.id]
        assert rig.engine.heirs == [rig.catalog.directory.resolve("public", "x")]


async def test_of_two_uploads_of_one_content_at_a_time_the_one_that_was_stored_leaves_its_copy(
    settings: Settings,
) -> None:
    async with running(settings) as rig:
        answers = await asyncio.gather(rig.push("x"), rig.push("x"))
        assert sorted(answer.status_code for answer in answers) == [200, 201]
        assert [heir for heir in rig.engine.heirs if heir] == [rig.catalog.directory.resolve("public", "x")]


async def test_what_was_tried_and_not_published_is_left_to_nobody(settings: Settings) -> None:
    async with running(settings) as rig:
        rig.engine.effect = Effect(prompt_tokens=8, max_abs_logit_delta=0.0, kl=0.0)
        assert (await rig.push("x")).status_code == 422
        assert rig.engine.heirs == [None]


async def test_an_upload_stands_whose_trial_cannot_be_forgotten(settings: Settings) -> None:
    """As when the engine ends between the two: the version is there, and saying otherwise would be wrong."""
    async with running(settings) as rig:

        async def ends(ref: AdapterRef) -> None:
            raise EngineDead("The engine has stopped.")

        rig.engine.users = ends
        assert (await rig.push("x")).status_code == 201
        assert rig.catalog.directory.resolve("public", "x").version == 1


async def test_the_engine_finds_the_files_of_what_it_is_given(settings: Settings) -> None:
    async with running(settings) as rig:
        await rig.push("x")
        ref = rig.catalog.directory.resolve("public", "x")
        folder = rig.catalog.local_folder(ref)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == sound_files()


async def test_everything_is_there_after_a_restart(settings: Settings) -> None:
    async with running(settings) as rig:
        await rig.push("x", pinned="true", description="first")
        await rig.push("x", sound_files(2.0), activate="false")
        await rig.push("y")
        before = [(await rig.call("GET", f"/v1/adapters/{name}")).json() for name in "xy"]
    async with running(settings) as rig:
        after = [(await rig.call("GET", f"/v1/adapters/{name}")).json() for name in "xy"]
        assert after == before
        assert [ref.label for ref in rig.engine.pinned.values()] == ["x@1"]
        rig.catalog.check_integrity()


async def test_a_description_with_the_character_that_not_every_database_takes_is_refused(settings: Settings) -> None:
    async with running(settings) as rig:
        for answer in (
            await rig.push("x", description="a\0b"),
            await rig.call("POST", "/v1/adapters", json={"name": "x", "source": "hf://a/b", "description": "\0"}),
        ):
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "description")
        await rig.push("x", description="before")
        answer = await rig.call("PATCH", "/v1/adapters/x", json={"description": "a\0"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "description")
        assert (await rig.call("GET", "/v1/adapters/x")).json()["description"] == "before"
