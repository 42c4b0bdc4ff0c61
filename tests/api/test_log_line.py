"""The line of each inference request: prompts only where asked for, and who asked."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from manylora.errors import AdapterLoadFailed
from manylora.log import configure_logging
from manylora.settings import Settings
from manylora.tenants.interface import Principal, Role

from .conftest import Rig
from .fakes import FakeGate


@pytest.fixture
def as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, structured = list(root.handlers), root.level, structlog.get_config()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.configure(**structured)


def line_of(rig: Rig, **body: Any) -> dict[str, Any]:
    with capture_logs() as logs:
        rig.complete(**body)
    (line,) = logs
    return dict(line)


@pytest.fixture
def telling(settings: Settings) -> Rig:
    return Rig(settings.model_copy(update={"log_prompts": True}))


def test_prompts_are_in_the_line_when_asked_for(telling: Rig) -> None:
    assert line_of(telling, prompt=["first", "second"])["prompts"] == ["<s>first", "<s>second"]


def test_a_chat_is_in_the_line_as_the_model_reads_it(telling: Rig) -> None:
    with capture_logs() as logs:
        telling.chat()
    assert logs[0]["prompts"] == ["[user]hi[assistant]"]


@pytest.mark.parametrize("broken", [{"error_at": 0}, {"error_at": 1}])
def test_without_asking_no_line_has_a_prompt_even_when_the_engine_fails(rig: Rig, broken: dict[str, int]) -> None:
    rig.engine.error_at = broken["error_at"]
    with capture_logs() as logs:
        rig.complete(prompt="a secret")
        rig.complete(prompt="a secret", stream=True)
        rig.complete(prompt="a secret", temperature="a secret")
    assert len(logs) >= 3
    assert "secret" not in str([{k: v for k, v in line.items() if k != "exc_info"} for line in logs])


def test_the_answers_id_leads_to_its_line(rig: Rig) -> None:
    with capture_logs() as logs:
        answer = rig.complete().json()
    assert answer["id"] == f"cmpl-{logs[0]['job_id']}"


def test_the_line_names_the_key_and_the_adapter_and_never_the_secret(settings: Settings) -> None:
    gate = FakeGate(keys={"s3cret": Principal("acme", Role.USER, key_id="key_1")})
    rig = Rig(settings, gate=gate)
    rig.client.headers["authorization"] = "Bearer s3cret"
    line = line_of(rig, model="beta")
    assert (line["tenant"], line["key_id"], line["adapter"], line["adapter_id"]) == (
        "acme", "key_1", "beta@1", "acme/beta/1",
    )  # fmt: skip
    assert "s3cret" not in str(line)


def test_an_error_within_a_stream_is_in_the_line(rig: Rig) -> None:
    rig.engine.error_at, rig.engine.error = 2, AdapterLoadFailed("alpha's files are gone")
    line = line_of(rig, stream=True)
    assert (line["status"], line["outcome"], line["code"]) == (200, "error", "adapter_load_failed")
    assert line["error"] == "alpha's files are gone"


def test_other_lines_about_a_request_have_its_id(rig: Rig, as_before: None) -> None:
    stream = io.StringIO()
    configure_logging(level="info", as_json=True, stream=stream)
    rig.engine.error_at = 0
    request_id = rig.complete().headers["x-request-id"]
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["event"], line["request_id"]) for line in lines if line["logger"].startswith("manylora")] == [
        ("request_failed", request_id),
        ("request", request_id),
    ]
    found = rig.client.get(f"/v1/logs/{request_id}").json()
    assert [(line["event"], line["level"]) for line in found["data"]] == [
        ("request_failed", "error"),
        ("request", "info"),
    ]
    assert "the engine tripped" in found["data"][0]["fields"]["traceback"]
    assert found["data"][1]["fields"]["status"] == 500
    assert rig.client.get("/v1/logs/another").json()["data"] == []


@pytest.mark.parametrize("role", [Role.USER, Role.MANAGER])
def test_lines_of_requests_are_for_admins(rig: Rig, role: Role) -> None:
    rig.gate.keys |= {"acme": Principal("acme", role)}
    answer = rig.client.get("/v1/logs/any", headers={"authorization": "Bearer acme"})
    assert answer.status_code == 403
