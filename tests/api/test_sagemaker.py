"""What SageMaker asks of a container."""

from typing import Any

import httpx2
import pytest

from .conftest import Rig

MESSAGES = [{"role": "user", "content": "hi"}]


def invoke(rig: Rig, body: dict[str, Any], adapter: str | None = None) -> httpx2.Response:
    headers = {} if adapter is None else {"X-Amzn-SageMaker-Adapter-Identifier": adapter}
    response: httpx2.Response = rig.client.post("/invocations", json=body, headers=headers)
    return response


def test_ping_is_well_while_requests_are_answered(rig: Rig) -> None:
    assert rig.client.get("/ping").status_code == 200
    rig.engine.is_ready = False
    assert rig.client.get("/ping").status_code == 503


def test_a_body_is_read_as_what_it_looks_like(rig: Rig) -> None:
    assert invoke(rig, {"messages": MESSAGES}).json()["choices"][0]["message"]["content"] == rig.engine.text
    assert invoke(rig, {"prompt": "hi", "max_tokens": 3}).json()["choices"][0]["text"] == "The"
    assert invoke(rig, {"inputs": "hi"}).json()[0]["generated_text"] == rig.engine.text
    stream = invoke(rig, {"inputs": "hi", "stream": True, "parameters": {"max_new_tokens": 2}})
    assert stream.text.count("data: ") == 2


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "inputs": "b"}, {"model": "alpha"}])
def test_any_other_body_is_refused(rig: Rig, body: dict[str, Any]) -> None:
    assert invoke(rig, body).status_code == 400


@pytest.mark.parametrize("body", [{"messages": MESSAGES}, {"prompt": "hi"}, {"inputs": "hi", "parameters": None}])
def test_the_header_names_the_adapter(rig: Rig, body: dict[str, Any]) -> None:
    assert invoke(rig, body).headers["x-manylora-adapter"] == "base"
    assert invoke(rig, body, "alpha").headers["x-manylora-adapter"] == "alpha@1"
    assert invoke(rig, body, "nobody").status_code == 404


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "hi", "model": "alpha"},
        {"prompt": "hi", "adapter_id": "alpha"},
        {"inputs": "hi", "parameters": {"adapter_id": "alpha"}},
    ],
)
def test_two_different_adapters_are_refused(rig: Rig, body: dict[str, Any]) -> None:
    assert invoke(rig, body, "beta").status_code == 400
    assert invoke(rig, body, "alpha").status_code == 200
