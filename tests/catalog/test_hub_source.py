"""Imports from a Hugging Face hub: the real client against a small server that speaks the hub's file protocol."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from manylora.catalog.sources import fetch
from manylora.errors import InvalidAdapter, InvalidRequest, TooLarge, Unavailable
from manylora.settings import Settings

from .rig import CONFIG_FILE, running, sound_files

REVISIONS = {"main": "a" * 40, "v2": "b" * 40}


def _files(revision: str) -> dict[str, bytes]:
    """Version 2 has defaults."""
    return {**sound_files(2.0), "manylora.json": b'{"temperature": 0}'} if revision == "v2" else sound_files(1.0)


class _Hub(BaseHTTPRequestHandler):
    """`/OWNER/REPO/resolve/REVISION/FILE` as the hub answers it; acme/lora has an adapter, acme/half its config."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        owner, repo, _, revision, name = self.path.strip("/").split("/")
        files = _files(revision)
        commit = REVISIONS.get(revision)
        if f"{owner}/{repo}" not in ("acme/lora", "acme/half"):
            self._fail("RepoNotFound")
        elif commit is None:
            self._fail("RevisionNotFound")
        elif name not in files or (repo == "half" and name != CONFIG_FILE):
            self._fail("EntryNotFound")
        else:
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(files[name]).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Length", str(len(files[name])))
            self.end_headers()
            if with_body:
                self.wfile.write(files[name])

    def _fail(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


def _point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does, which is read when the client is imported."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        _point_at(f"http://127.0.0.1:{server.server_port}", monkeypatch)
        yield
        server.shutdown()
        thread.join()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(("source", "revision"), [("hf://acme/lora", "main"), ("hf://acme/lora@v2", "v2")])
def test_a_repository_gives_its_files_at_its_revision(target: Path, source: str, revision: str) -> None:
    fetch(source, target, allow=("hf://acme",), max_bytes=2**20)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == _files(revision)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("hf://acme/absent", InvalidRequest),
        ("hf://acme/lora@absent", InvalidRequest),
        ("hf://acme/half", InvalidAdapter),
    ],
)
def test_what_the_hub_has_not_is_told_and_leaves_nothing(target: Path, source: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        fetch(source, target, allow=("hf://acme",), max_bytes=2**20)
    assert not list(target.iterdir())


@pytest.mark.usefixtures("hub")
def test_a_repository_over_the_limit_is_not_downloaded(target: Path) -> None:
    with pytest.raises(TooLarge):
        fetch("hf://acme/lora", target, allow=("hf://acme",), max_bytes=100)
    assert not list(target.iterdir())


def test_a_hub_that_does_not_answer_is_told_as_such(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _point_at("http://127.0.0.1:1", monkeypatch)
    with pytest.raises(Unavailable):
        fetch("hf://acme/lora", target, allow=("hf://acme",), max_bytes=2**20)


@pytest.mark.anyio
@pytest.mark.usefixtures("hub")
async def test_json_imports_a_repository_for_an_admin(settings: Settings) -> None:
    allowing = settings.model_copy(update={"import_allow": ("hf://acme",)})
    async with running(allowing) as rig:
        answer = await rig.call("POST", "/v1/adapters", json={"name": "x", "source": "hf://acme/lora@v2"})
        assert (answer.status_code, answer.json()["version"]) == (201, 1), answer.text
        assert answer.json()["defaults"] == {"temperature": 0}
        refused = await rig.call("POST", "/v1/adapters", json={"name": "y", "source": "hf://other/lora"})
        assert refused.status_code == 403
