import time
from collections.abc import Callable

import httpx
import pytest

from manylora.client.adapters import active_version, check_name, pinned
from manylora.client.server import Refused, Server, Unreachable, connect
from manylora.errors import InvalidRequest, ManyloraError

Answer = Callable[[httpx.Request], httpx.Response]


def _server(answer: Answer, *, is_patient: bool = True) -> Server:
    return Server(httpx.Client(transport=httpx.MockTransport(answer), base_url="http://server"), is_patient=is_patient)


def test_busy_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    answers = [
        httpx.Response(429, headers={"retry-after": "2"}),
        httpx.Response(503),
        httpx.Response(200, json={"a": 1}),
    ]

    assert _server(lambda _: answers.pop(0)).call("GET", "/x") == {"a": 1}
    assert waits == [2.0, 1.0]


def test_used_up_quota_is_an_error_at_once() -> None:
    said = {"error": {"message": "The quota is used up."}}

    with pytest.raises(ManyloraError, match="429 The quota is used up"):
        _server(lambda _: httpx.Response(429, headers={"retry-after": "3600"}, json=said)).call("GET", "/x")


def test_every_problem_of_a_refused_upload_is_passed_on() -> None:
    problems = [{"where": "config.r", "message": "too large"}, {"where": "x.lora_A", "message": "not finite"}]
    said = {"error": {"message": "The adapter is refused.", "problems": problems}}

    with pytest.raises(ManyloraError) as caught:
        _server(lambda _: httpx.Response(422, json=said)).call("POST", "/v1/adapters")
    assert "config.r: too large" in caught.value.message
    assert "x.lora_A: not finite" in caught.value.message


def test_broken_connection_and_answers_of_something_else_are_errors_of_ours() -> None:
    def broken(_: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("gone")

    with pytest.raises(Unreachable, match=r"http://server.* cannot be reached: gone"):
        _server(broken).call("GET", "/x")
    with pytest.raises(ManyloraError, match="502 <html>"):
        _server(lambda _: httpx.Response(502, text="<html>")).call("GET", "/x")
    with pytest.raises(Refused, match="/x: 200 hello"):
        _server(lambda _: httpx.Response(200, text="hello")).call("GET", "/x")
    with pytest.raises(InvalidRequest, match="`server` is no URL"):
        connect("http://a:b").__enter__()
    with pytest.raises(InvalidRequest, match="`server` must begin with http://"):
        connect("localhost:8000").__enter__()


def test_nobody_waits_for_a_busy_server_unless_asked_to() -> None:
    answer = httpx.Response(503, headers={"retry-after": "2"}, json={"error": {"message": "Busy."}})

    with pytest.raises(Refused, match="503 Busy") as caught:
        _server(lambda _: answer, is_patient=False).call("GET", "/x")
    assert (caught.value.answered, caught.value.retry_after, caught.value.error) == (503, "2", {"message": "Busy."})


def test_key_that_may_not_publish_is_said_before_the_work() -> None:
    server = _server(lambda _: httpx.Response(200, json={"you": {"role": "user"}}))

    with pytest.raises(InvalidRequest, match="has the role 'user'"):
        check_name(server, "fine")
    with pytest.raises(InvalidRequest, match="no adapter's name"):
        check_name(server, "No Good")


def test_bare_name_is_pinned_to_its_active_version() -> None:
    server = _server(lambda _: httpx.Response(200, json={"active_version": 2}))

    assert (pinned(server, "a"), pinned(server, "a@1")) == ("a@2", "a@1")
    assert active_version(_server(lambda _: httpx.Response(200, json={"active_version": None})), "a") is None
