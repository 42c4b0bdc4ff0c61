"""A README.md beside an adapter's files is its card: kept with the version, shown and handed back."""

import json
from pathlib import Path
from typing import Any

import pytest

from manylora.catalog.card import (
    MAX_CARD_BYTES,
    MAX_EXAMPLES,
    MAX_FRONT_MATTER,
    MAX_LINEAGE_COMMAND,
    MAX_LINEAGE_SCORES,
    MAX_SCORE_NAME,
    examples_of,
    lineage_in,
)
from manylora.catalog.labels import Label
from manylora.catalog.queries import adopted_version
from manylora.database.tables import AdapterRow
from manylora.lifecycle.card import Card
from manylora.settings import Settings

from .rig import running, sound_files, tar_of, write_sound

pytestmark = pytest.mark.anyio
CARD = "---\nwidget:\n- text: 你好\n---\n# Sums\n\n<script>alert(1)</script>\n"
KEYS = ("acme:manager", "acme:user", "rival:user", "ops:admin")


def with_card(text: str | bytes = CARD, seed: float = 1.0) -> dict[str, bytes]:
    return {**sound_files(seed), "README.md": text if isinstance(text, bytes) else text.encode()}


async def test_a_card_comes_with_every_kind_of_upload_and_stays_with_its_version(settings: Settings) -> None:
    path = "/v1/adapters/sums/versions"
    async with running(settings, *KEYS) as rig:
        first = await rig.push("sums", with_card(), "acme:manager")
        assert first.json()["card_bytes"] == len(CARD.encode())
        second = await rig.push_archive("sums", tar_of(with_card("# Newer\n", 2.0), prefix="sums/"), "acme:manager")
        assert (second.json()["version"], second.json()["card_bytes"]) == (2, 8)
        said = {"object": "adapter.card", "name": "sums", "version": 1, "text": CARD, "examples": ["你好"]}
        answer = await rig.call("GET", f"{path}/1/card", "acme:user")
        assert (answer.json(), answer.headers["content-type"]) == (said, "application/json")
    async with running(settings) as rig:  # a server that is started again
        await rig.make_keys("acme:manager", "rival:user")
        answer = await rig.call("GET", f"{path}/2/card", "acme:manager")
        assert (answer.json()["text"], answer.json()["examples"]) == ("# Newer\n", [])
        archive = (await rig.call("GET", f"{path}/2/download", "acme:manager")).content
        again = await rig.push_archive("copy", archive, "acme:manager")
        assert again.json()["card_bytes"] == 8
        foreign = await rig.call("GET", f"{path}/1/card", "rival:user")
        missing = await rig.call("GET", "/v1/adapters/nosums/versions/1/card", "rival:user")
        assert foreign.status_code == missing.status_code == 404
        assert foreign.json()["error"]["message"].replace("sums", "nosums") == missing.json()["error"]["message"]


async def test_a_version_says_how_it_was_made_wherever_it_is_shown(settings: Settings) -> None:
    made = {"command": 'manylora train --out "城市"', "data_sha256": "ab" * 32, "scores": {"held-out loss": 0.5}}
    text = f"---\nlineage: {json.dumps(made, ensure_ascii=False)}\n---\n# Sums\n"
    async with running(settings) as rig:
        pushed = await rig.push("sums", with_card(text))
        assert pushed.json()["lineage"] == made
        second = await rig.push("sums", with_card("# Nothing said\n", 2.0))
        assert second.json()["lineage"] == {}
    async with running(settings) as rig:
        found = (await rig.call("GET", "/v1/adapters/sums")).json()
        assert found["lineage"] == made
        assert [version["lineage"] for version in found["versions"]] == [made, {}]
        newer = await rig.push("sums", with_card(text, 2.0))  # the same content with a card that says it
        assert (newer.json()["version"], newer.json()["lineage"]) == (2, made)
        labels = [
            Label.model_validate_json(path.read_bytes()) for path in (settings.data_dir / "store/labels").iterdir()
        ]
        assert [json.loads(adopted_version(AdapterRow(id="a"), label).lineage) for label in labels] == [made, made]


def test_what_training_writes_is_read_as_it_was_meant() -> None:
    digests = {"data": "0" * 64, "eval": "f" * 64}
    report: dict[str, Any] = {
        "settings": {"lora": {"rank": 4, "alpha": None, "targets": []}},
        "lengths": {"train": {"num_examples": 2, "num_tokens": 9}},
        "data_sha256": digests, "base": "tiny", "num_parameters": 1, "size_bytes": 2, "steps": 3, "seconds": 1.0,
        "device": "cpu", "best_eval_loss": 0.123456, "scores": {"accuracy": 0.5, "macro_f1": 0.25, "num_examples": 2},
    }  # fmt: skip
    command = "manylora train --instruction '只答城市：\n\"是\"' " + "x" * 2000
    made = json.loads(lineage_in(Card.of_training("city", command, report).markdown()))
    assert made == {
        "command": command[: MAX_LINEAGE_COMMAND - 1] + "…",
        "data_sha256": digests["data"],
        "eval_sha256": digests["eval"],
        "scores": {"held-out loss": 0.1235, "held-out accuracy": 0.5, "held-out macro F1": 0.25},
    }


def test_lineage_is_what_has_its_form() -> None:
    def said(**lineage: object) -> object:
        text = lineage_in(f"---\nlineage: {json.dumps(lineage)}\n---\n")
        return json.loads(text) if text else None

    assert said(command=["x"], data_sha256="AB" * 32, scores=[1]) is None
    assert said(command="x" * 9000, eval_sha256="0" * 64) == {
        "command": "x" * MAX_LINEAGE_COMMAND,
        "eval_sha256": "0" * 64,
    }
    many = {str(number): number for number in range(50)}
    assert said(scores={"y" * (MAX_SCORE_NAME + 1): 1, "z": "nan", "w": "no", "": 2, **many}) == {
        "scores": dict(list(many.items())[:MAX_LINEAGE_SCORES])
    }
    assert lineage_in("---\nlineage: 3\n---\n") == lineage_in("# A card\n") == ""


async def test_another_card_for_the_same_content_is_no_new_version(settings: Settings) -> None:
    async with running(settings) as rig:
        none = await rig.push("sums")
        assert none.json()["card_bytes"] == 0
        missing = await rig.call("GET", "/v1/adapters/sums/versions/1/card")
        assert missing.status_code == 404
        assert "README.md" in missing.json()["error"]["message"]
        pushed = await rig.push("sums", with_card())
        assert (pushed.status_code, pushed.json()["version"]) == (200, 1)
        assert pushed.json()["card_bytes"] == len(CARD.encode())
        left_alone = await rig.push("sums")  # without one: that one stays
        assert left_alone.json()["card_bytes"] == len(CARD.encode())
        history = (await rig.call("GET", "/v1/adapters/sums/history")).json()["data"]
        assert [(change["action"], change["fields"]) for change in history] == [("change", ["card"]), ("upload", [])]
        (label,) = (settings.data_dir / "store" / "labels").iterdir()
        known = Label.model_validate_json(label.read_bytes())
        again = adopted_version(AdapterRow(id="adapter_0"), known)  # as a rescan of the store brings it back
        assert (again.card, again.card_bytes) == (CARD, len(CARD.encode()))


async def test_a_folder_of_the_server_brings_its_card_and_a_newer_one(settings: Settings, tmp_path: Path) -> None:
    folder = write_sound(tmp_path / "adapters" / "sums")
    async with running(settings) as rig:
        for text in ("# One\n", "# Two\n"):
            (folder / "README.md").write_text(text)
            await rig.catalog.register_folder(folder.parent)
            assert (await rig.call("GET", "/v1/adapters/sums/versions/1/card")).json()["text"] == text
        assert (await rig.call("GET", "/v1/adapters/sums")).json()["num_versions"] == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [(b"x" * (MAX_CARD_BYTES + 1), "Shorten it"), (b"\xff\xfe\x00", "no UTF-8"), (b"a\0b", "no UTF-8")],
)
async def test_a_card_that_cannot_be_kept_is_a_warning(settings: Settings, text: bytes, said: str) -> None:
    async with running(settings) as rig:
        done = await rig.push("sums", with_card(text))
        assert done.status_code == 201, done.text
        assert done.json()["card_bytes"] == 0
        assert [said in warning for warning in done.json()["report"]["warnings"] if "README.md" in warning] == [True]


def test_examples_are_the_hubs_widgets() -> None:
    turns = "  - {role: user, content: b}\n  - {role: assistant, content: c}\n"
    told = f"---\nwidget:\n- text: ' a '\n- messages:\n{turns}---\n"
    assert examples_of(told) == ["a", "b"]
    many = "---\nwidget:\n" + "".join(f"- text: {n}\n" for n in range(50)) + "---\n"
    assert examples_of(many) == [str(n) for n in range(MAX_EXAMPLES)]


@pytest.mark.parametrize(
    "head",
    [
        "widget: [", "widget: 3", "widget: {text: a}", "widget:\n- 3\n- [a]\n- text: [b]\n- messages: [c]", "- a", "",
        "widget: " + "[" * 9000, "a: &a [x]\n" + "".join(f"a{n}: &a{n} [*a, *a]\n" for n in range(500)),
        'widget:\n- text: "\\UFFFFFFFF"', 'widget:\n- text: "a\\uD800b"',
        "%YAML 1" + "9" * 5000 + ".1\n---\nwidget: []",
        "widget:\n- text: a\nb: " + "[" * 21 + "]" * 21, "- " * 5000 + "a",
        "widget:\n- text: " + "x" * MAX_FRONT_MATTER, "widget:\n- !!python/object/apply:os.system [id]",
    ],
)  # fmt: skip
def test_odd_front_matter_has_no_examples(head: str) -> None:
    assert examples_of(f"---\n{head}\n---\n# A card\n") == []


def test_a_card_without_an_end_of_its_front_matter_has_no_examples() -> None:
    assert examples_of("---\nwidget:\n- text: a\n") == []
