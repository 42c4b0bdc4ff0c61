"""Defaults of adapters through the front door: set, uploaded, rolled back, and there again after a kill."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from manylora.identity import ADAPTER_FILES
from tests.e2e.conftest import Server

CHOICES = ["positive", "negative"]


def ask(server: Server, model: str, **fields: Any) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], **fields}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)


def text(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def patch(server: Server, name: str, **body: Any) -> httpx.Response:
    return httpx.patch(f"{server.url}/v1/adapters/{name}", json=body, timeout=120)


def shown(server: Server, name: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/v1/adapters/{name}").json()
    return found


def upload(server: Server, folder: Path, name: str, defaults: object) -> httpx.Response:
    files = [("files", (part, (folder / part).read_bytes())) for part in ADAPTER_FILES]
    if defaults is not None:
        files.append(("files", ("manylora.json", json.dumps(defaults).encode())))
    form = {"name": name, "activate": "true"}
    return httpx.post(f"{server.url}/v1/adapters", data=form, files=files, timeout=120)


def test_defaults_are_set_kept_over_a_kill_and_rolled_back_with_their_version(
    own_server: Callable[..., Any], adapters_dir: Path
) -> None:
    folder = adapters_dir / "small"
    with own_server() as server:
        assert upload(server, folder, "labels", None).json()["defaults"] == {}
        said = {"choices": CHOICES, "temperature": 0, "locked": ["choices"]}
        assert patch(server, "labels", defaults=said).json()["defaults"] == said
        assert text(ask(server, "labels")) in CHOICES
        refused = ask(server, "labels", structured_outputs={"choice": ["maybe"]})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "structured_outputs")
        other = {"choices": ["one", "two"]}
        second = upload(server, folder, "labels", other).json()
        assert (second["version"], second["defaults"]) == (2, other), "the same content with other defaults is new"
        assert upload(server, folder, "labels", other).status_code == 200, "the same again is what is there"
        assert text(ask(server, "labels")) in other["choices"]
        assert text(ask(server, "labels@1")) in CHOICES
        server.process.kill()
    with own_server() as server:
        assert [v["defaults"] for v in shown(server, "labels")["versions"]] == [said, other]
        assert text(ask(server, "labels")) in other["choices"]
        assert patch(server, "labels", active_version=1).json()["defaults"] == said
        assert text(ask(server, "labels")) in CHOICES
        download = httpx.get(f"{server.url}/v1/adapters/labels/versions/1/download").content
        with tarfile.open(fileobj=io.BytesIO(download)) as tar:
            member = tar.extractfile("manylora.json")
            assert member is not None
            assert json.load(member) == said
        again = httpx.post(
            f"{server.url}/v1/adapters", data={"name": "copy"}, files={"archive": ("a.tgz", download)}, timeout=120
        )
        assert again.json()["defaults"] == said
        assert patch(server, "labels", defaults={}).json()["defaults"] == {}
        assert shown(server, "labels")["versions"][1]["defaults"] == other


def test_the_order_of_a_schemas_properties_is_the_order_of_the_answer(server: Server, adapters_dir: Path) -> None:
    properties = {"z": {"const": 1}, "a": {"const": 2}, "m": {"const": 3}}
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    said = {"structured_outputs": {"json": schema, "separators": [", ", ": "]}}
    wanted = '{"z": 1, "a": 2, "m": 3}'
    assert upload(server, adapters_dir / "small", "ordered", said).status_code == 201
    assert text(ask(server, "ordered")) == text(ask(server, "large", **said)) == wanted
    assert patch(server, "ordered", defaults={}).status_code == 200
    assert patch(server, "ordered", defaults=said).status_code == 200
    assert text(ask(server, "ordered")) == wanted
    assert httpx.delete(f"{server.url}/v1/adapters/ordered").status_code in (200, 204)


def test_defaults_that_do_not_go_are_refused_with_every_reason(server: Server, adapters_dir: Path) -> None:
    wrong = {"temperature": 9, "guided_regex": "(", "made_up": 1}
    for answer in (patch(server, "large", defaults=wrong), upload(server, adapters_dir / "large", "wrong", wrong)):
        assert answer.status_code == 422
        assert {problem["where"] for problem in answer.json()["error"]["problems"]} == {"temperature", "made_up"}
        assert {problem["code"] for problem in answer.json()["error"]["problems"]} == {"bad_defaults"}
    [problem] = patch(server, "large", defaults={"guided_regex": "("}).json()["error"]["problems"]
    assert problem["where"] == "guided_regex"
    assert shown(server, "large")["defaults"] == {}
    assert httpx.get(f"{server.url}/v1/adapters/wrong").status_code == 404


SHOUT = "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}"
FOREVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}" + "{% endfor %}" * 3


def test_an_adapters_own_template_is_what_its_chats_are_written_with(
    own_server: Callable[..., Any], adapters_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "served" / "loud"
    shutil.copytree(adapters_dir / "small", folder)
    (folder / "manylora.json").write_text('{"chat_template": "chat_template.jinja", "temperature": 0}')
    (folder / "chat_template.jinja").write_text(SHOUT)
    shutil.copytree(folder, folder.with_name("usual"))
    (folder.with_name("usual") / "manylora.json").unlink()
    chat: dict[str, Any] = {"model": "loud", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
    with own_server(adapters=str(folder.parent)) as server:
        assert shown(server, "loud")["defaults"] == {"chat_template": SHOUT, "temperature": 0}
        assert shown(server, "usual")["defaults"] == {}
        wanted = {"model": "loud", "prompt": "USER: hello\n", "max_tokens": 8, "add_special_tokens": False}
        plain = httpx.post(f"{server.url}/v1/completions", json=wanted, timeout=120).json()
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=chat, timeout=120).json()
        assert answer["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
        assert answer["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
        tokens = httpx.post(f"{server.url}/tokenize", json={k: chat[k] for k in ("model", "messages")}).json()
        assert tokens["count"] == plain["usage"]["prompt_tokens"]
        refused = httpx.post(f"{server.url}/v1/chat/completions", json={**chat, "chat_template": SHOUT}, timeout=120)
        assert "allow_request_chat_template" in refused.json()["error"]["message"]
        assert server.stderr.read_text().count("chat_template.jinja") == 1, "of the folder that does not name it"
        for template, said in ((FOREVER, "takes too much time"), ("{{ x", "fails"), ("Hello!", "leaves out")):
            [problem] = patch(server, "loud", defaults={"chat_template": template}).json()["error"]["problems"]
            assert (problem["where"], said in problem["message"]) == ("chat_template", True), problem
        upload(server, adapters_dir / "small", "missing", {"chat_template": "chat_template.jinja"})
        assert httpx.get(f"{server.url}/v1/adapters/missing").status_code == 404
        only_later = (
            "{% for m in messages %}{{ m.content }}{% if m.content == 'now' %}" + FOREVER + "{% endif %}{% endfor %}"
        )
        assert patch(server, "usual", defaults={"chat_template": only_later}).status_code == 200
        later = ask(server, "usual", messages=[{"role": "user", "content": "now"}])
        assert (later.status_code, later.json()["error"]["param"]) == (400, "messages")
        assert ask(server, "usual", max_tokens=2).status_code == 200


def run(server: Server, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MANYLORA_URL": server.url, "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "manylora", "adapters", *words],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_the_command_line_sets_takes_away_and_shows(
    own_server: Callable[..., Any], adapters_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "labels"
    shutil.copytree(adapters_dir / "small", folder)
    (folder / "manylora.json").write_text('{"choices": ["a", "b"]}')
    with own_server() as server:
        assert run(server, "push", str(folder)).returncode == 0
        assert shown(server, "labels")["defaults"] == {"choices": ["a", "b"]}
        assert run(server, "set", "labels", "temperature=0", "system_prompt=Be brief.").returncode == 0
        assert shown(server, "labels")["defaults"] == {
            "choices": ["a", "b"], "system_prompt": "Be brief.", "temperature": 0,
        }  # fmt: skip
        for label in ("labels", "labels@1"):
            said = run(server, "show", label).stdout
            assert "Be brief." in said
            assert '["a", "b"]' in said
        assert run(server, "set", "labels", "choices=").returncode == 0
        assert shown(server, "labels")["defaults"] == {"system_prompt": "Be brief.", "temperature": 0}
        assert run(server, "set", "labels", "--file", str(folder / "manylora.json")).returncode == 0
        assert shown(server, "labels")["defaults"] == {"choices": ["a", "b"]}
        refused = run(server, "set", "labels", "temperature=9", "made_up=1")
        assert refused.returncode != 0
        assert "made_up" in refused.stderr + refused.stdout
        assert run(server, "set", "labels", "--clear").returncode == 0
        assert shown(server, "labels")["defaults"] == {}
        assert run(server, "set", "labels").returncode == 2


def test_a_folders_defaults_come_in_once_and_again_when_its_file_changes(
    own_server: Callable[..., Any], adapters_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "served" / "labels"
    shutil.copytree(adapters_dir / "small", folder)
    for choices in (["a", "b"], ["a", "b"], ["c", "d"]):
        (folder / "manylora.json").write_text(json.dumps({"choices": choices}))
        with own_server(adapters=str(folder.parent)) as server:
            versions = shown(server, "labels")["versions"]
            assert text(ask(server, "labels")) in choices
    assert [version["defaults"]["choices"] for version in versions] == [["a", "b"], ["c", "d"]]
    with own_server(adapters=str(folder.parent)) as server:
        patch(server, "labels", defaults={"choices": ["e"]})
    shutil.move(folder, tmp_path / "moved" / "labels")
    with own_server(adapters=str(tmp_path / "moved")) as server:
        assert shown(server, "labels")["defaults"] == {"choices": ["e"]}, "what was set since stays"
