"""Request ids, the log line, and the body's limit."""

import http.client
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI
from structlog.testing import capture_logs

from .conftest import Rig


@pytest.mark.parametrize("path", ["/health", "/nope", "/v1/models", "/docs"])
def test_every_answer_has_a_request_id(rig: Rig, path: str) -> None:
    first, second = (rig.client.get(path).headers["x-request-id"] for _ in range(2))
    assert first
    assert first != second


def test_a_sane_request_id_is_kept(rig: Rig) -> None:
    assert (
        rig.client.get("/health", headers={"x-request-id": "trace-1:a.b_C"}).headers["x-request-id"] == "trace-1:a.b_C"
    )


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a\tb", 'a"b'])
def test_any_other_request_id_is_replaced(rig: Rig, given: str) -> None:
    assert rig.client.get("/health", headers={"x-request-id": given}).headers["x-request-id"] != given


def test_two_requests_with_one_id_are_two_to_the_engine(rig: Rig) -> None:
    for _ in range(2):
        rig.client.headers["x-request-id"] = "same"
        assert rig.complete().status_code == 200
    assert len({g.request_id for g in rig.engine.generations}) == 2


def test_one_log_line_has_ids_names_tokens_and_times_and_no_text(rig: Rig) -> None:
    with capture_logs() as logs:
        rig.complete(
            model="alpha", prompt="a secret", user="u1", metadata={"team": "x"}, store=False, service_tier="auto"
        )
    (line,) = logs
    assert line["event"] == "request"
    expected = {
        "tenant": "public",
        "adapter": "alpha@1",
        "outcome": "ok",
        "status": 200,
        "path": "/v1/completions",
        "prompt_tokens": 9,
        "completion_tokens": 16,
        "cached_tokens": 2,
        "queue_ms": 1.5,
        "load_tier": "host",
        "user": "u1",
        "metadata": {"team": "x"},
        "store": False,
        "service_tier": "auto",
    }
    assert {k: line[k] for k in expected} == expected
    assert {"request_id", "duration_ms", "ttft_ms", "tpot_ms"} <= line.keys()
    assert "secret" not in str(line)


def test_the_line_of_a_refused_request_has_the_code(rig: Rig) -> None:
    with capture_logs() as logs:
        rig.complete(model="gone")
        rig.client.get("/nope")
    assert [(line["status"], line["code"]) for line in logs] == [(404, "adapter_not_found"), (404, "not_found")]
    assert logs[0]["outcome"] == "invalid"


def test_an_unforeseen_error_is_logged_with_its_traceback(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.directory, "visible_to", lambda tenant, start: 1 / 0)
    with capture_logs() as logs:
        answer = rig.client.get("/v1/models")
    assert answer.status_code == 500
    assert [line["event"] for line in logs] == ["unexpected_error", "request"]
    assert logs[0]["exc_info"] is True
    assert logs[0]["request_id"] == answer.headers["x-request-id"]


LIMIT = 64 * 1024


def test_a_body_over_the_limit_is_refused(rig: Rig) -> None:
    answer = rig.complete(prompt="x" * LIMIT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert str(LIMIT) in answer.json()["error"]["message"]


def test_a_body_of_unknown_length_is_refused_where_it_passes_the_limit(rig: Rig) -> None:
    num_sent = []

    def chunks() -> Iterator[bytes]:
        for number in range(1000):
            num_sent.append(number)
            yield b"x" * 1024

    answer = rig.client.post("/v1/completions", content=chunks(), headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert answer.headers["x-request-id"]


def test_an_upload_may_be_as_large_as_an_adapter(rig: Rig) -> None:
    answer = rig.client.post("/v1/adapters", content=b"x" * (LIMIT + 1))
    assert answer.status_code == 404, "no such route here, but not for its size"


@pytest.fixture
def url(rig: Rig, serve: Callable[[FastAPI], Any]) -> Iterator[str]:
    with serve(rig.app) as address:
        yield address


def test_a_hundred_megabytes_are_answered_and_the_server_goes_on(rig: Rig, url: str) -> None:
    answer = httpx.post(f"{url}/v1/completions", content=b"x" * 100_000_000, timeout=60)
    assert answer.status_code == 413
    assert httpx.get(f"{url}/health").status_code == 200


def test_a_client_that_announces_too_much_is_answered_before_it_sends(url: str) -> None:
    connection = http.client.HTTPConnection(str(urlsplit(url).hostname), urlsplit(url).port)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("content-length", "100000000")
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 413
    assert b"request_too_large" in answer.read()
    connection.close()


def test_a_client_that_leaves_while_sending_is_no_error(rig: Rig, url: str) -> None:
    connection = http.client.HTTPConnection(str(urlsplit(url).hostname), urlsplit(url).port)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("content-length", "100")
    connection.putheader("content-type", "application/json")
    connection.endheaders()
    connection.send(b"{")
    httpx.get(f"{url}/health")
    connection.close()
    while not rig.finished:
        httpx.get(f"{url}/health")
    assert rig.finished[0].outcome == "cancelled"


def test_an_answer_is_counted_under_its_route_whoever_asked_and_how(rig: Rig) -> None:
    for method, path in (("GET", "/v1/models/alpha"), ("HEAD", "/v1/models/alpha"), ("GET", "/v1/none")):
        rig.client.request(method, path)
    counted = [line for line in rig.metrics.render().decode().splitlines() if "http_requests_total{" in line]
    assert counted == [
        'manylora_http_requests_total{method="GET",route="/v1/models/{model_id}",status="200"} 1.0',
        'manylora_http_requests_total{method="HEAD",route="/v1/models/{model_id}",status="200"} 1.0',
        'manylora_http_requests_total{method="__other__",route="__other__",status="404"} 1.0',
    ]
