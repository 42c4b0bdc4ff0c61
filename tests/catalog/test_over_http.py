"""A real server process on a real (tiny) model: hostile uploads, kills, and what a tenant can learn of another."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from .real_server import Server, serving
from .rig import files_of, sound_files
from .test_refused_uploads import ARCHIVES, AS_FILES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tiny_base, tmp_path_factory.mktemp("server")) as server:
        assert server.push("sound", sound_files()).status_code == 201
        yield server


@pytest.mark.parametrize(("build", "code"), [pytest.param(build, code, id=name) for name, build, code in AS_FILES])
def test_a_malformed_adapter_gets_its_code_leaves_nothing_and_harms_nobody(
    server: Server, tmp_path: Path, build: Callable[[Path], None], code: str
) -> None:
    before, answer = server.stored(), server.complete("sound")
    build(tmp_path / "upload")
    response = server.push("x", files_of(tmp_path / "upload"))
    assert (response.status_code, response.json()["error"]["type"]) == (422, "invalid_adapter")
    assert code in {problem["code"] for problem in response.json()["error"]["problems"]}
    assert server.stored() == before
    assert server.client.get("/v1/adapters/x").status_code == 404
    assert server.complete("sound") == answer


@pytest.mark.parametrize(("archive", "code"), [pytest.param(data, code, id=name) for name, data, code in ARCHIVES])
def test_an_unsafe_archive_gets_its_code_leaves_nothing_and_harms_nobody(
    server: Server, archive: bytes, code: str
) -> None:
    before, answer = server.stored(), server.complete("sound")
    response = server.client.post("/v1/adapters", data={"name": "x"}, files=[("archive", ("a.tar.gz", archive))])
    assert response.status_code == 422, response.text
    assert code in {problem["code"] for problem in response.json()["error"]["problems"]}
    assert server.stored() == before
    assert server.client.get("/v1/adapters/x").status_code == 404
    assert server.complete("sound") == answer


def test_weights_too_small_to_move_a_logit_have_no_effect(server: Server) -> None:
    before = server.stored()
    response = server.push("x", sound_files(1e-25))
    assert [problem["code"] for problem in response.json()["error"]["problems"]] == ["no_effect"]
    assert server.stored() == before


def test_weights_that_overflow_are_not_finite_and_touch_nobody_else(server: Server) -> None:
    before, answer = server.stored(), server.complete("sound")
    response = server.push("x", sound_files(1e30))
    assert [problem["code"] for problem in response.json()["error"]["problems"]] == ["not_finite"]
    assert server.stored() == before
    assert server.complete("sound") == answer


def test_an_upload_over_the_limit_is_too_large(server: Server) -> None:
    before = server.stored()
    files = {**sound_files(), "adapter_model.safetensors": b"\0" * (4 * 2**20 + 1)}
    assert server.push("x", files).status_code == 413
    assert server.stored() == before


def test_after_kill_9_every_adapter_is_absent_or_whole_and_answers_as_before(tiny_base: Path, tmp_path: Path) -> None:
    answers: dict[str, str] = {}  # by digest
    promised: dict[str, int] = {}  # the newest version that was answered for
    for round_number in range(3):
        with serving(tiny_base, tmp_path / "server") as server:
            for name in ("a", "b"):
                shown = server.client.get(f"/v1/adapters/{name}")
                versions = shown.json()["versions"] if shown.status_code == 200 else []
                assert promised.get(name, 0) <= max((v["version"] for v in versions), default=0)
                for version in versions:
                    text = server.complete(f"{name}@{version['version']}")
                    assert answers.setdefault(version["digest"], text) == text
            _work_until_killed(server, round_number, answers, promised)
    assert len(answers) > 3
    assert sorted(promised) == ["a", "b"]


def _work_until_killed(server: Server, round_number: int, answers: dict[str, str], promised: dict[str, int]) -> None:
    """Upload and promote; the kill comes in the middle of an upload."""
    for number in range(4):
        name = "ab"[number % 2]
        done = server.push(name, sound_files(1.0 + 10 * round_number + number))
        assert done.status_code == 201, done.text
        promised[name] = done.json()["version"]
        answers[done.json()["digest"]] = server.complete(f"{name}@{promised[name]}")
        patched = server.client.patch(f"/v1/adapters/{name}", json={"active_version": promised[name]})
        assert patched.status_code == 200

    def slowly() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\na\r\n'
        yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="adapter_config.json"\r\n\r\n'
        time.sleep(0.05 * round_number)
        server.process.kill()
        yield sound_files()["adapter_config.json"] + b"\r\n--b--\r\n"

    with pytest.raises(httpx.HTTPError):
        server.client.post(
            "/v1/adapters", content=slowly(), headers={"content-type": "multipart/form-data; boundary=b"}
        )
