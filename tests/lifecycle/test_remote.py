import time
from collections.abc import Callable

import httpx
import pytest

from manylora.client.adapters import active_version, check_name, pinned
from manylora.client.server import call, connect
from manylora.errors import InvalidRequest, ManyloraError

Answer = Callable[[httpx.Request], httpx.Response]


def _client(answer: Answer) -> httpx.Client:
    return httpx.Client(transport=httpx.MockTransport(answer), base_url="http://server")


def test_busy_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    answers = [
        httpx.Response(429, headers={"retry-after": "2"}),
        httpx.Response(503),
        httpx.Response(200, json={"a": 1}),
    ]

    assert call(_client(lambda _: answers.pop(0)), "GET", "/x") == {"a": 1}
    assert waits == [2.0, 1.0]


def test_used_up_quota_is_an_error_at_once() -> None:
    said = {"error": {"message": "The quota is used up."}}

    with pytest.raises(ManyloraError, match="429 The quota is used up"):
        call(_client(lambda _: httpx.Response(429, headers={"retry-after": "3600"}, json=said)), "GET", "/x")


def test_every_problem_of_a_refused_upload_is_passed_on() -> None:
    problems = [{"where": "config.r", "message": "too large"}, {"where": "x.lora_A", "message": "not finite"}]
    said = {"error": {"message": "The adapter is refused.", "problems": problems}}

    with pytest.raises(ManyloraError) as caught:
        call(_client(lambda _: httpx.Response(422, json=said)), "POST", "/v1/adapters")
    assert "config.r: too large" in caught.value.message
    assert "x.lora_A: not finite" in caught.value.message


def test_broken_connection_and_answers_of_something_else_are_errors_of_ours() -> None:
    def broken(_: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("gone")

    with pytest.raises(ManyloraError, match="does not answer any more"):
        call(_client(broken), "GET", "/x")
    with pytest.raises(ManyloraError, match="502 <html>"):
        call(_client(lambda _: httpx.Response(502, text="<html>")), "GET", "/x")
    with pytest.raises(ManyloraError, match="is no URL"):
        connect("http://a:b", "").__enter__()


def test_key_that_may_not_publish_is_said_before_the_work() -> None:
    client = _client(lambda _: httpx.Response(200, json={"you": {"role": "user"}}))

    with pytest.raises(InvalidRequest, match="has the role 'user'"):
        check_name(client, "fine")
    with pytest.raises(InvalidRequest, match="no adapter's name"):
        check_name(client, "No Good")


def test_bare_name_is_pinned_to_its_active_version() -> None:
    versions = [{"version": 1, "active": False}, {"version": 2, "active": True}]
    client = _client(lambda _: httpx.Response(200, json={"versions": versions}))

    assert (pinned(client, "a"), pinned(client, "a@1")) == ("a@2", "a@1")
    assert active_version(_client(lambda _: httpx.Response(200, json={"versions": versions[:1]})), "a") is None
