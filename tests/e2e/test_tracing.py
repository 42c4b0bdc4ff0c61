"""Traces of a real server, sent to a real OTLP receiver and decoded there."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.otlp import Receiver, receiving

pytestmark = pytest.mark.slow
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


def wait_for(receiver: Receiver, names: set[str]) -> None:
    """Spans arrive when the server sends its batch."""
    for _ in range(600):
        if names <= {span.name for span in receiver.spans if span.trace_id == TRACE}:
            return
        time.sleep(0.1)
    raise AssertionError(f"received only {[span.name for span in receiver.spans]}")


@contextmanager
def busy_with(url: str, adapter: str) -> Iterator[None]:
    """The adapter's request is being answered, so that with a single slot another adapter has to wait for its load."""
    long = {"max_tokens": 200, "ignore_eos": True, "n": 16, "logprobs": 5}  # much more work than asking for another
    body = {"model": adapter, "prompt": "Once", "stream": True, **long}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer:
        next(answer.iter_lines())
        yield


def test_a_request_is_one_server_span_with_its_stations_in_order(
    own_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        # Without room in host memory, where its registration would have left it, the adapter comes from disk.
        settings = {"tracing": True, "log_json": True, "max_slots": 1, "host_tier_memory": 1}
        # The client is made beforehand, since that takes longer than the other request may last.
        with httpx.Client(timeout=120) as client, own_server(**settings) as server, busy_with(server.url, "middle"):
            body = {"model": "small", "prompt": "The quick", "max_tokens": 8, "ignore_eos": True, "stream": True}
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            answer = client.post(f"{server.url}/v1/completions", json=body, headers=headers)
            assert answer.text.rstrip().endswith("[DONE]")
            wait_for(receiver, {"POST /v1/completions", "queue", "adapter load", "prefill", "decode"})
            log = [json.loads(line) for line in server.stderr.read_text().splitlines() if line.startswith("{")]
    first, *rest = receiver.of_trace(TRACE)
    assert (first.name, first.kind, first.parent_id) == ("POST /v1/completions", "SPAN_KIND_SERVER", PARENT)
    assert [span.name for span in rest] == ["queue", "adapter load", "prefill", "decode"]
    assert all(span.parent_id == first.span_id for span in rest)
    times = [first.start_ns, *(moment for span in rest for moment in (span.start_ns, span.end_ns)), first.end_ns]
    assert times == sorted(times)
    assert [span.end_ns for span in rest[:-1]] == [span.start_ns for span in rest[1:]]
    assert first.attributes["gen_ai.usage.output_tokens"] == 8
    assert first.attributes["manylora.load_tier"] == "disk"
    assert first.service["service.name"] == "manylora"
    (line,) = [line for line in log if line["event"] == "request" and line.get("trace_id") == TRACE]
    assert (line["path"], line["span_id"]) == ("/v1/completions", first.span_id)
    assert "The quick" not in str(receiver.spans) + str(log)


def test_sigterm_sends_what_was_not_sent_yet(own_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
        with own_server(tracing=True) as server:
            httpx.get(f"{server.url}/v1/models")
            assert receiver.spans == []
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(60) == 0
        assert [span.name for span in receiver.spans] == ["GET /v1/models"]
