"""Hostile and broken requests: a clear error each, and the server goes on."""

from typing import Any

import pytest

from .conftest import Rig
from .fakes import VOCAB_SIZE


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b'{"model": "base-model", "prompt": "\xff\xfe"}',
        b'{"model": "base-model", "prompt": "\\ud800"}',
        b'{"model": "base-model", "prompt": "hi", "temperature": NaN}',
        b'{"model": "base-model", "prompt": "hi", "temperature": Infinity}',
        b'{"model": "base-model", "prompt": "hi", "temperature": 1e999}',
        b'{"model": "base-model", "prompt": "hi", "n": ' + b"9" * 5000 + b"}",
        b'{"model": "base-model", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
)
def test_a_body_that_is_no_request_is_refused(rig: Rig, body: bytes) -> None:
    answer = rig.client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert rig.complete().status_code == 200


def test_a_body_that_is_not_declared_json_is_refused(rig: Rig) -> None:
    answer = rig.client.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert answer.status_code == 400
    assert "application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        [],
        [""],
        [[]],
        ["a", ""],
        ["a", 1],
        [1, "a"],
        [[1], "a"],
        [[1, "a"]],
        5,
        None,
        {},
        True,
        [True],
        [None],
        [-1],
        [VOCAB_SIZE],
        [1.5],
        [2**70],
        [[1], [-1]],
        ["a"] * 257,
    ],
)
def test_a_prompt_without_meaning_is_refused(rig: Rig, prompt: Any) -> None:
    answer = rig.complete(prompt=prompt)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    assert not rig.engine.generations


@pytest.mark.parametrize(
    "body",
    [{"prompt": "x" * 256}, {"prompt": "x" * 300}, {"prompt": "x" * 200, "max_tokens": 56}, {"max_tokens": 2**62}],
)
def test_what_does_not_fit_the_context_is_refused(rig: Rig, body: dict[str, Any]) -> None:
    answer = rig.complete(**body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
    assert "256" in error["message"]


def test_an_over_long_chat_is_refused(rig: Rig) -> None:
    answer = rig.chat(messages=[{"role": "user", "content": "x" * 300}])
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")


def test_a_prompt_that_fills_the_context_but_one_gets_one_token(rig: Rig) -> None:
    answer = rig.complete(prompt="x" * 254)
    assert answer.json()["usage"]["completion_tokens"] == 1


def test_a_prompt_of_a_megabyte_is_counted_and_refused(rig: Rig) -> None:
    rig = Rig(rig.settings.model_copy(update={"max_body": 2**22}))
    answer = rig.complete(prompt="x" * 2**20)
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_the_templates_refusal_names_the_messages(rig: Rig) -> None:
    answer = rig.chat(messages=[{"role": "tool", "content": "42", "tool_call_id": "1"}])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    assert "tool" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)])
def test_a_wrong_route_or_method_has_an_error_of_the_usual_shape(rig: Rig, method: str, path: str, status: int) -> None:
    answer = rig.client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


def test_an_unexpected_exception_says_nothing_of_its_inside(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(text: str, **_: Any) -> list[int]:
        raise RuntimeError("secret of the inside")

    monkeypatch.setattr(rig.engine.codec, "encode", explode)
    answer = rig.complete()
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"]
    assert rig.finished[-1].outcome == "error"
