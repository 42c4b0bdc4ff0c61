"""A real server process on a real (tiny) model: hostile uploads, kills, and what a tenant can learn of another."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.lora.malformed import TINY_LLAMA
from tests.tiny_models import VOCAB_SIZE, make_tiny_model

from .rig import files_of, sound_files
from .test_refused_uploads import ARCHIVES, AS_FILES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
START_S = 180.0


@dataclass
class Server:
    """A server process that is up."""

    process: "subprocess.Popen[str]"
    client: httpx.Client

    def complete(self, model: str) -> str:
        body = {"model": model, "prompt": "The quick brown fox", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
        response = self.client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["text"]
        return text

    def push(self, name: str, files: Mapping[str, bytes]) -> httpx.Response:
        parts = [("files", (file, data)) for file, data in files.items()]
        return self.client.post("/v1/adapters", data={"name": name}, files=parts)


@contextmanager
def serving(model: Path, folder: Path, **settings: Any) -> Iterator[Server]:
    """The process, killed with SIGKILL at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {
        "model": str(model), "served_name": "tiny", "port": 0, "dtype": "float32", "kv_cache_memory": "4MiB",
        "adapter_memory": "64MiB", "host_tier_memory": "64MiB", "num_threads": 1, "data_dir": str(folder / "data"),
        "max_adapter_size": "4MiB", **settings,
    }  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.serve_once", json.dumps(wanted)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, (folder / "log").read_text()
        with httpx.Client(base_url=json.loads(line)["url"], timeout=START_S) as client:
            yield Server(process, client)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base for which `tests.lora.malformed` makes its adapters, with a vocabulary that the tokenizer needs."""
    return make_tiny_model("llama", tmp_path_factory.mktemp("base"), **{**TINY_LLAMA, "vocab_size": VOCAB_SIZE})


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    folder = tmp_path_factory.mktemp("server")
    with serving(base, folder) as server:
        assert server.push("sound", sound_files()).status_code == 201
        yield server, folder / "data"


def _stored(data: Path) -> set[str]:
    return {str(p.relative_to(data)) for p in data.rglob("*") if p.is_file() and ".sqlite3" not in p.name}


@pytest.mark.parametrize(("build", "code"), [pytest.param(build, code, id=name) for name, build, code in AS_FILES])
def test_a_malformed_adapter_gets_its_code_leaves_nothing_and_harms_nobody(
    server: tuple[Server, Path], tmp_path: Path, build: Callable[[Path], None], code: str
) -> None:
    running, data = server
    before, answer = _stored(data), running.complete("sound")
    build(tmp_path / "upload")
    response = running.push("x", files_of(tmp_path / "upload"))
    assert (response.status_code, response.json()["error"]["type"]) == (422, "invalid_adapter")
    assert code in {problem["code"] for problem in response.json()["error"]["problems"]}
    assert _stored(data) == before
    assert running.client.get("/v1/adapters/x").status_code == 404
    assert running.complete("sound") == answer


@pytest.mark.parametrize(("archive", "code"), [pytest.param(data, code, id=name) for name, data, code in ARCHIVES])
def test_an_unsafe_archive_gets_its_code_leaves_nothing_and_harms_nobody(
    server: tuple[Server, Path], archive: bytes, code: str
) -> None:
    running, data = server
    before, answer = _stored(data), running.complete("sound")
    response = running.client.post("/v1/adapters", data={"name": "x"}, files=[("archive", ("a.tar.gz", archive))])
    assert response.status_code == 422, response.text
    assert code in {problem["code"] for problem in response.json()["error"]["problems"]}
    assert _stored(data) == before
    assert running.client.get("/v1/adapters/x").status_code == 404
    assert running.complete("sound") == answer


def test_weights_too_small_to_move_a_logit_have_no_effect(server: tuple[Server, Path]) -> None:
    running, data = server
    before = _stored(data)
    response = running.push("x", sound_files(1e-25))
    assert [problem["code"] for problem in response.json()["error"]["problems"]] == ["no_effect"]
    assert _stored(data) == before


def test_weights_that_overflow_are_not_finite_and_touch_nobody_else(server: tuple[Server, Path]) -> None:
    running, data = server
    before, answer = _stored(data), running.complete("sound")
    response = running.push("x", sound_files(1e30))
    assert [problem["code"] for problem in response.json()["error"]["problems"]] == ["not_finite"]
    assert _stored(data) == before
    assert running.complete("sound") == answer


def test_an_upload_over_the_limit_is_too_large(server: tuple[Server, Path]) -> None:
    running, data = server
    before = _stored(data)
    files = {**sound_files(), "adapter_model.safetensors": b"\0" * (4 * 2**20 + 1)}
    assert running.push("x", files).status_code == 413
    assert _stored(data) == before


def test_after_kill_9_every_adapter_is_absent_or_whole_and_answers_as_before(base: Path, tmp_path: Path) -> None:
    answers: dict[str, str] = {}  # by digest
    promised: dict[str, int] = {}  # the newest version that was answered for
    for round_number in range(3):
        with serving(base, tmp_path / "server") as running:
            for name in ("a", "b"):
                shown = running.client.get(f"/v1/adapters/{name}")
                versions = shown.json()["versions"] if shown.status_code == 200 else []
                assert promised.get(name, 0) <= max((v["version"] for v in versions), default=0)
                for version in versions:
                    text = running.complete(f"{name}@{version['version']}")
                    assert answers.setdefault(version["digest"], text) == text
            _work_until_killed(running, round_number, answers, promised)
    assert len(answers) > 3
    assert sorted(promised) == ["a", "b"]


def _work_until_killed(running: Server, round_number: int, answers: dict[str, str], promised: dict[str, int]) -> None:
    """Upload and promote; the kill comes in the middle of an upload."""
    for number in range(4):
        name = "ab"[number % 2]
        done = running.push(name, sound_files(1.0 + 10 * round_number + number))
        assert done.status_code == 201, done.text
        promised[name] = done.json()["version"]
        answers[done.json()["digest"]] = running.complete(f"{name}@{promised[name]}")
        patched = running.client.patch(f"/v1/adapters/{name}", json={"active_version": promised[name]})
        assert patched.status_code == 200

    def slowly() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\na\r\n'
        yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="adapter_config.json"\r\n\r\n'
        time.sleep(0.05 * round_number)
        running.process.kill()
        yield sound_files()["adapter_config.json"] + b"\r\n--b--\r\n"

    with pytest.raises(httpx.HTTPError):
        running.client.post(
            "/v1/adapters", content=slowly(), headers={"content-type": "multipart/form-data; boundary=b"}
        )
