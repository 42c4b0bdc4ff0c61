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


# ids that the tokenizer makes and the model has no row for

RARE = "<rare>"


@pytest.fixture
def uneven(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """A tokenizer with one token more than the model."""
    plain = rig.engine.codec.encode

    def encode(text: str, *, add_special_tokens: bool = True) -> list[int]:
        head, *rest = text.split(RARE)
        ids = plain(head, add_special_tokens=add_special_tokens)
        for piece in rest:
            ids += [VOCAB_SIZE, *plain(piece, add_special_tokens=False)]
        return ids

    monkeypatch.setattr(rig.engine.codec, "encode", encode)
    rig.engine.context_length = 100_000
    return rig


@pytest.mark.parametrize("long", ["", "x" * 20_000], ids=["short", "long"])
@pytest.mark.parametrize("prompt", [RARE, f"a {RARE} b", ["fine", RARE]])
def test_a_text_with_a_token_that_the_model_lacks_is_refused(uneven: Rig, prompt: Any, long: str) -> None:
    answer = uneven.complete(prompt=[long + p for p in ([prompt] if isinstance(prompt, str) else prompt)])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    assert f"id {VOCAB_SIZE}" in answer.json()["error"]["message"]
    assert not uneven.engine.generations


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("long", ["", "x" * 20_000], ids=["short", "long"])
def test_a_chat_with_a_token_that_the_model_lacks_is_refused(uneven: Rig, role: str, long: str) -> None:
    answer = uneven.chat(messages=[{"role": role, "content": long + RARE}])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    assert not uneven.engine.generations


@pytest.mark.parametrize(
    "body",
    [{"prompt": [VOCAB_SIZE]}, {"prompt": [[1], [VOCAB_SIZE]]}, {"stop_token_ids": [VOCAB_SIZE]},
     {"logit_bias": {str(VOCAB_SIZE): 1}}, {"prompt": [VOCAB_SIZE], "echo": True}],
)  # fmt: skip
def test_every_other_way_an_id_comes_in_is_checked_too(rig: Rig, body: dict[str, Any]) -> None:
    answer = rig.complete(**body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(body)))


def test_what_surely_does_not_fit_is_not_tokenised(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(rig.settings.model_copy(update={"max_body": 2**24}))
    for name in ("encode", "encode_many"):
        monkeypatch.setattr(rig.engine.codec, name, None)
    for answer in (
        rig.complete(prompt="x" * 5_000_000),
        rig.complete(prompt=["fine"] * 100 + ["x" * 5_000_000]),
        rig.chat(messages=[{"role": "user", "content": "x" * 5_000_000}]),
        rig.complete(prompt=[[1] * 10, [1] * 100_000], echo=True),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_more_of_the_prompt_than_is_given_back_is_refused(rig: Rig) -> None:
    rig = Rig(rig.settings.model_copy(update={"max_body": 2**24}))
    rig.engine.context_length = 600_000
    for body, param in (
        ({"prompt": [1] * 524_289, "echo": True, "logprobs": 1}, "logprobs"),
        ({"prompt": [1] * 8193, "echo": True, "logprobs": 0, "n": 128}, "logprobs"),
        ({"prompt": "x" * 70_000, "echo": True, "n": 128}, "echo"),
    ):
        answer = rig.complete(max_tokens=1, **body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [{"role": "user", "content": "a"}] * 2049}, "messages"),
        ({"logit_bias": {str(i): 1 for i in range(4097)}}, "logit_bias"),
        ({"metadata": {str(i): "a" for i in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: "a"}}, "metadata"),
        ({"messages": [{"role": "user", "content": "a", "name": "n" * 257}]}, "messages[0].name"),
    ],
)
def test_counts_over_their_bound_are_refused(rig: Rig, body: dict[str, Any], param: str) -> None:
    rig = Rig(rig.settings.model_copy(update={"max_body": 2**24}))
    answer = rig.chat(**body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(param)


def test_a_token_that_is_spelt_in_two_ways_is_named(rig: Rig) -> None:
    error = rig.complete(logit_bias={"5": 1, "005": -1}).json()["error"]
    assert error["param"] == "logit_bias"
    assert "names the token 5 more than once, the last time as '005'" in error["message"]


def test_a_query_with_the_character_that_not_every_database_takes_names_its_parameter(rig: Rig) -> None:
    answer = rig.client.get("/v1/models?limit=2&after=a%00")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "after")
    assert "U+0000" in answer.json()["error"]["message"]
