"""Spans: what is drawn, below whom, and that nothing of it holds text. The receiver decodes what was really sent."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient
from structlog.testing import capture_logs

from manylora.api.tracing import Tracing, open_tracing, stations
from manylora.engine.interface import Progress
from manylora.errors import InvalidSettings, ManyloraError, StartupError
from manylora.metrics import Metrics
from manylora.serving.app import create_app
from manylora.settings import Settings
from tests.otlp import ReceivedSpan, Receiver, receiving

from .fakes import FakeDirectory, FakeEngine, FakeGate

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NOT_SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        yield receiver


class Traced:
    """An application with tracing on; `spans()` sends what there is and gives everything received."""

    def __init__(self, settings: Settings, receiver: Receiver) -> None:
        self.receiver = receiver
        self.engine = FakeEngine()
        opened = open_tracing(settings.model_copy(update={"tracing": True}))
        assert isinstance(opened, Tracing)
        self.tracing = opened
        app = create_app(settings, self.engine, FakeDirectory(), FakeGate(), Metrics(), tracing=self.tracing)
        self.client = TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)

    def complete(self, headers: dict[str, str] | None = None, **body: Any) -> Any:
        asked = {"model": "alpha", "prompt": "a secret", "max_tokens": 4, **body}
        return self.client.post("/v1/completions", json=asked, headers=headers)

    def spans(self) -> list[ReceivedSpan]:
        self.tracing.close()
        return self.receiver.spans


@pytest.fixture
def traced(settings: Settings, receiver: Receiver) -> Traced:
    return Traced(settings, receiver)


def below(spans: list[ReceivedSpan], server: ReceivedSpan) -> list[str]:
    children = [span for span in spans if span.parent_id == server.span_id]
    assert all(span.trace_id == server.trace_id for span in children)
    return [span.name for span in sorted(children, key=lambda span: span.start_ns)]


def servers(spans: list[ReceivedSpan]) -> list[ReceivedSpan]:
    return [span for span in spans if span.kind == "SPAN_KIND_SERVER"]


@pytest.mark.parametrize("stream", [False, True])
def test_one_server_span_has_the_stations_below_it(traced: Traced, stream: bool) -> None:
    traced.complete(stream=stream)
    spans = traced.spans()
    (server,) = servers(spans)
    assert (server.name, server.parent_id) == ("POST /v1/completions", "")
    assert below(spans, server) == ["queue", "prefill", "decode"]
    assert len(spans) == 4
    expected = {
        "http.request.method": "POST", "http.route": "/v1/completions", "http.response.status_code": 200,
        "manylora.tenant": "public", "manylora.adapter": "alpha@1", "manylora.outcome": "ok",
        "gen_ai.usage.input_tokens": 9, "gen_ai.usage.output_tokens": 4, "manylora.load_tier": "host",
    }  # fmt: skip
    assert {name: server.attributes.get(name) for name in expected} == expected


def test_the_callers_traceparent_is_honoured(traced: Traced) -> None:
    traced.complete({"traceparent": PARENT})
    (server,) = servers(traced.spans())
    assert (server.trace_id, server.parent_id) == (PARENT[3:35], PARENT[36:52])


def test_a_caller_who_does_not_sample_is_not_sampled(traced: Traced) -> None:
    traced.complete({"traceparent": NOT_SAMPLED})
    assert traced.spans() == []


def test_no_span_has_text_of_the_prompt_or_the_answer(traced: Traced) -> None:
    traced.complete(user="somebody")
    traced.complete(stream=True, temperature=9)
    text = str(traced.spans())
    assert "secret" not in text
    assert "somebody" not in text


def test_several_prompts_have_stations_each(traced: Traced) -> None:
    traced.complete(prompt=["a", "b"])
    numbers = [span.attributes.get("manylora.prompt") for span in traced.spans() if span.name == "queue"]
    assert numbers == [0, 1]


def test_a_refused_request_is_a_server_span_alone(traced: Traced) -> None:
    traced.complete(model="nobody")
    (server,) = traced.spans()
    assert server.attributes["http.response.status_code"] == 404
    assert server.attributes["manylora.outcome"] == "invalid"
    assert not server.is_error


def test_an_error_in_a_stream_marks_the_span_although_the_status_was_sent(traced: Traced) -> None:
    traced.engine.error_at, traced.engine.error = 2, ManyloraError("the engine tripped")
    traced.complete(stream=True)
    (server,) = servers(traced.spans())
    assert (server.attributes["http.response.status_code"], server.attributes["manylora.outcome"]) == (200, "error")
    assert server.is_error


def test_what_machines_ask_every_few_seconds_is_not_traced(traced: Traced) -> None:
    for path in ("/health", "/ready", "/metrics", "/v1/stats"):
        traced.client.get(path)
    traced.client.get("/v1/models")
    assert [span.name for span in traced.spans()] == ["GET /v1/models"]


def test_standard_variables_name_the_service_and_the_headers(
    settings: Settings, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "chat")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-token=abc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    traced = Traced(settings, receiver)
    traced.complete()
    service = traced.spans()[0].service
    assert (service["service.name"], service["deployment.environment"]) == ("chat", "test")
    assert receiver.headers[0]["x-token"] == "abc"
    assert receiver.headers[0]["content-encoding"] == "gzip"
    assert receiver.paths[0] == "/v1/traces"


def test_without_a_name_the_service_is_manylora(traced: Traced) -> None:
    traced.complete()
    service = traced.spans()[0].service
    assert service["service.name"] == "manylora"
    assert service["service.version"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("OTEL_TRACES_SAMPLER", "always_off"), ("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")],
)
def test_standard_variables_can_silence_it(
    settings: Settings, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    traced = Traced(settings, receiver)
    assert traced.complete().status_code == 200
    assert traced.spans() == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
    ],
)
def test_exporters_that_there_are_not_stop_the_start(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidSettings, match=value):
        open_tracing(Settings(tracing=True))


def test_a_missing_sdk_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(StartupError, match=r"pip install .*opentelemetry-sdk.* .*otlp-proto-http"):
        open_tracing(Settings(tracing=True))


def test_it_is_off_by_default_and_then_loads_nothing() -> None:
    script = (
        "import sys\n"
        "from manylora.api.tracing import open_tracing\n"
        "from manylora.settings import Settings\n"
        "assert open_tracing(Settings()) is None\n"
        "import manylora.serving.app\n"
        "heavy = ('opentelemetry.sdk', 'opentelemetry.exporter')\n"
        "sys.exit(' '.join(name for name in sys.modules if name.startswith(heavy)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_a_receiver_that_is_gone_disturbs_no_request(
    settings: Settings, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    traced = Traced(settings, receiver)
    assert traced.complete().status_code == 200
    traced.tracing.close()


def test_the_log_line_names_the_request_of_the_trace(traced: Traced) -> None:
    with capture_logs() as logs:
        answer = traced.complete()
    (server,) = servers(traced.spans())
    assert server.attributes["manylora.request_id"] == logs[0]["request_id"] == answer.headers["x-request-id"]


# the stations of a request


def test_a_request_that_waited_for_its_adapter_has_a_station_for_it() -> None:
    passed = Progress(5, 1.0, load_started_s=2.0, load_ended_s=3.0, scheduled_s=3.0, first_token_s=4.0, finished_s=6.0)
    assert list(stations(passed, 9.0)) == [
        ("queue", 1.0, 2.0), ("adapter load", 2.0, 3.0), ("prefill", 3.0, 4.0), ("decode", 4.0, 6.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        (Progress(0, 1.0), [("queue", 1.0, 9.0)]),
        (Progress(0, 1.0, load_started_s=2.0), [("queue", 1.0, 2.0), ("adapter load", 2.0, 9.0)]),
        (Progress(0, 1.0, scheduled_s=2.0), [("queue", 1.0, 2.0), ("prefill", 2.0, 9.0)]),
        (
            Progress(3, 1.0, scheduled_s=2.0, first_token_s=3.0),
            [("queue", 1.0, 2.0), ("prefill", 2.0, 3.0), ("decode", 3.0, 9.0)],
        ),
    ],
)
def test_a_request_that_was_left_was_last_where_it_was_left(
    left: Progress, expected: list[tuple[str, float, float]]
) -> None:
    assert list(stations(left, 9.0)) == expected
