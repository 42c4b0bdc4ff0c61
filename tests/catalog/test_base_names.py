"""Which names mean the served base, and what is said of an adapter that names another, or was made for another."""

import json
import sqlite3
from pathlib import Path

import pytest

from manylora.catalog.base_names import BaseNames
from manylora.catalog.base_signature import signature_of
from manylora.lora.format.reader import ModuleSpec
from manylora.settings import Settings

from .rig import CONFIG_FILE, MODULES, TENSOR_FILE, Rig, running, sound_files, write_sound

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("served", "named"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("Qwen/Qwen2.5-0.5B-Instruct@main", "qwen/qwen2.5-0.5b-instruct"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "unsloth/qwen2.5-0.5b-instruct-unsloth-bnb-4bit"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "unsloth/Qwen2.5-0.5B-Instruct-bnb-4bit"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct-GPTQ-Int4"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct-AWQ"),
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B-Instruct"),
        ("meta-llama/Llama-3.1-8B", "NousResearch/Meta-Llama-3.1-8B"),
        ("/srv/models/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("/cache/models--Qwen--Qwen2.5-0.5B/snapshots/0123abc", "Qwen/Qwen2.5-0.5B"),
        ("/srv/qwen2.5-0.5b-instruct-q4_k_m.gguf", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("/srv/Qwen2.5-0.5B-Instruct.Q8_0.gguf", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("Qwen/Qwen2.5-0.5B-Instruct-GGUF", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("meta-llama/Llama-2-7b-hf", "TheBloke/Llama-2-7B-GPTQ"),
        ("Qwen/Qwen2.5-0.5B", None),
        ("Qwen/Qwen2.5-0.5B", ""),
        ("Qwen/Qwen2.5-0.5B", "/home/me/checkpoint-500"),
        ("Qwen/Qwen2.5-0.5B", "./base"),
        ("Qwen/Qwen2.5-0.5B", "models/my-base"),
        ("Qwen/Qwen2.5-0.5B", "C:\\models\\base"),
        ("Qwen/Qwen2.5-0.5B", "a/b/c"),
        (None, "Qwen/Qwen2.5-0.5B-Instruct"),
    ],
)
def test_names_of_the_served_model_and_names_that_say_nothing(served: str | None, named: str | None) -> None:
    assert not BaseNames([served]).differ_from(named)
    assert BaseNames([served]).warning(named) is None


@pytest.mark.parametrize(
    ("served", "named"),
    [
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B"),
        ("Qwen/Qwen2.5-Coder-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "unsloth/Qwen2.5-Coder-0.5B-Instruct-bnb-4bit"),
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3-8B-Instruct"),
        ("/srv/Qwen2.5-0.5B-Instruct-q4_k_m.gguf", "Qwen/Qwen2.5-0.5B"),
        ("/srv/models/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.3"),
    ],
)
def test_names_of_other_models_of_the_same_shape(served: str, named: str) -> None:
    warning = BaseNames([served]).warning(named)
    assert warning is not None
    assert named in warning
    assert "/srv" not in warning


@pytest.mark.parametrize("named", ["owner/" + "q4-" * 100_000, "owner/" + "a-" * 98, "o" * 10**6 + "/x", "/" * 10**6])
def test_a_name_that_no_hub_has_says_nothing(named: str) -> None:
    assert BaseNames(["org/model"]).warning(named) is None


def naming(base: str, seed: float) -> dict[str, bytes]:
    files = sound_files(seed)
    changed = {**json.loads(files[CONFIG_FILE]), "base_model_name_or_path": base}
    return {CONFIG_FILE: json.dumps(changed).encode(), TENSOR_FILE: files[TENSOR_FILE]}


async def test_an_adapter_that_names_another_model_is_taken_with_a_warning_and_marked_everywhere(
    settings: Settings,
) -> None:
    settings = settings.model_copy(update={"model": "Qwen/Qwen2.5-0.5B"})
    async with running(settings) as rig:
        pushed = (await rig.push("other", naming("Qwen/Qwen2.5-0.5B-Instruct", 1.0))).json()
        assert any("Qwen/Qwen2.5-0.5B-Instruct" in warning for warning in pushed["report"]["warnings"])
        assert pushed["status"] == "ready"
        same = (await rig.push("same", naming("unsloth/qwen2.5-0.5b-bnb-4bit", 2.0))).json()
        assert same["report"]["warnings"] == []
        listed = {a["name"]: a for a in (await rig.call("GET", "/v1/adapters")).json()["data"]}
        for name, differs in (("other", True), ("same", False)):
            shown = (await rig.call("GET", f"/v1/adapters/{name}")).json()
            version = (await rig.call("GET", f"/v1/adapters/{name}/versions/1")).json()
            for view in (listed[name], shown, shown["versions"][0]["report"], version["report"]):
                assert view["base_model_differs"] is differs
                assert view["base_model"] == version["report"]["base_model"]
    # The same database with another model of the same shape: who fits is another one.
    async with running(settings.model_copy(update={"model": "Qwen/Qwen2.5-0.5B-Instruct"})) as rig:
        listed = {a["name"]: a for a in (await rig.call("GET", "/v1/adapters")).json()["data"]}
        assert {name: a["base_model_differs"] for name, a in listed.items()} == {"other": False, "same": True}


async def test_adapters_of_another_base_are_told_apart(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    from . import rig as rig_module

    async with running(settings) as rig:
        await rig.push("x", sound_files(1.0))
        await rig.push("x", sound_files(2.0), activate="true")
        await rig.push("y", sound_files(3.0), pinned="true")
    shallower = {path: spec for path, spec in rig_module.MODULES.items() if "layers.1" not in path}
    monkeypatch.setattr(rig_module, "MODULES", shallower)
    async with running(settings) as rig:
        assert rig.catalog.directory.num_usable == 0
        assert len(rig.catalog.directory) == 2
        listed = (await rig.call("GET", "/v1/adapters")).json()["data"]
        assert {a["name"]: a["status"] for a in listed} == {"x": "other_base", "y": "other_base"}
        shown = (await rig.call("GET", "/v1/adapters/x")).json()
        assert [v["status"] for v in shown["versions"]] == ["other_base", "other_base"]
        refused = await rig.call("PATCH", "/v1/adapters/x", json={"active_version": 1})
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
        assert "another" in refused.text or "other shapes" in refused.text
        assert (await rig.call("GET", "/v1/adapters/x")).json()["active_version"] == 2
        assert await models_of(rig) == ["base-model"]
        assert rig.engine.pinned == {}
    monkeypatch.undo()
    async with running(settings) as rig:
        assert rig.catalog.directory.num_usable == 2
        assert await models_of(rig) == ["base-model", "x", "y"]


def say_made_for(settings: Settings, base: str) -> None:
    """As if all versions had been registered for that base."""
    with sqlite3.connect(settings.data_dir / "registry.sqlite3") as database:
        database.execute("UPDATE versions SET base = ?", (base,))
        database.execute("UPDATE folder_contents SET base = ?", (base,))
    database.close()


async def test_what_another_version_of_the_server_registered_is_served(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from . import rig as rig_module

    modules = {**rig_module.MODULES, "norm": ModuleSpec("norm", "norm", 64, 64)}
    monkeypatch.setattr(rig_module, "MODULES", modules)
    async with running(settings) as rig:
        first = (await rig.push("x")).json()
    say_made_for(settings, signature_of(modules).former[0])
    async with running(settings) as rig:
        assert await models_of(rig) == ["base-model", "x"]
        again = await rig.push("x")  # the same content, which is there
        assert (again.status_code, again.json()["id"], again.json()["status"]) == (200, first["id"], "ready")
        second = (await rig.push("x", sound_files(2.0))).json()
        assert (second["version"], second["active_version"]) == (2, 1)
        rolled = await rig.call("PATCH", "/v1/adapters/x", json={"active_version": 2})
        assert rolled.status_code == 200
        rig.catalog.check_integrity()


async def test_where_the_active_version_is_of_another_base_the_next_one_answers(
    settings: Settings, tmp_path: Path
) -> None:
    folder = write_sound(tmp_path / "adapters" / "y", 3.0)
    async with running(settings) as rig:
        await rig.push("x")
        await rig.catalog.register_folder(folder.parent)
        await rig.push("y", sound_files(4.0), activate="true")
    say_made_for(settings, "elsewhere")
    with sqlite3.connect(settings.data_dir / "registry.sqlite3") as database:
        database.execute("UPDATE folder_contents SET base = ?", (signature_of(MODULES).value,))
        database.execute("UPDATE versions SET base = ? WHERE version = 1", (signature_of(MODULES).value,))
        database.execute(
            "UPDATE versions SET base = 'elsewhere' WHERE adapter_id IN (SELECT id FROM adapters WHERE name = 'x')"
        )
        database.execute("DELETE FROM folders")
    database.close()
    async with running(settings) as rig:
        assert await models_of(rig) == ["base-model"]
        assert (await rig.push("x", sound_files(2.0))).json()["active"] is True
        await rig.catalog.register_folder(folder.parent)  # its content is there, and nothing else of that name answers
        assert await models_of(rig) == ["base-model", "x", "y"]
        assert (await rig.call("GET", "/v1/adapters/y")).json()["active_version"] == 1


async def models_of(rig: Rig) -> list[str]:
    return sorted(model["id"] for model in (await rig.call("GET", "/v1/models")).json()["data"])


def test_the_banner_counts_what_cannot_be_used_apart(capsys: pytest.CaptureFixture[str]) -> None:
    from manylora.cli.serve import _announce
    from manylora.serving.process import Announcement

    _announce(Announcement("http://x", "base", 3, 2, is_open=False))
    said = capsys.readouterr().out
    assert "base and 3 adapters" in said
    assert "2 more adapters were made for another base" in said
    _announce(Announcement("http://x", "base", 3, 0, is_open=False))
    assert "another base" not in capsys.readouterr().out
