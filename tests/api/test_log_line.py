"""The line of each inference request: prompts only where asked for, and who asked."""

from typing import Any

import pytest
from structlog.testing import capture_logs

from manylora.settings import Settings
from manylora.tenants.interface import Principal, Role

from .conftest import Rig
from .fakes import FakeGate


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
    assert logs[0]["prompts"] == ["<s>[user]hi[assistant]"]


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
