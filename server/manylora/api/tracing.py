"""OpenTelemetry: a server span for each request, and under an inference request's the stations it passed.

FastAPI makes the server span, by the semantic conventions for HTTP, below the caller's `traceparent`. The stations
(queue, adapter load, prefill, decode) are drawn when the request has ended, from times that the engine notes anyway:
nothing happens per token or per step. A thread of the SDK's own sends the spans. No span holds text of a prompt.
"""

import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.trace import Span, SpanKind, Status, StatusCode, get_current_span, set_span_in_context
from starlette.types import Scope

from manylora import __version__
from manylora.api.middleware import POLLED_PATHS
from manylora.api.record import RequestRecord
from manylora.engine.interface import Progress
from manylora.errors import InvalidSettings, StartupError
from manylora.packages import install_command
from manylora.settings import Settings

if TYPE_CHECKING:
    from fastapi.telemetry import TelemetryConfig
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

__all__ = ["NO_TRACING", "Tracing", "open_tracing", "stations"]

# FastAPI would otherwise look for a provider with every request.
NO_TRACING: Final["TelemetryConfig"] = {"tracing": False, "metrics": False, "logs": False}
_NANOSECONDS: Final = 1_000_000_000


def open_tracing(settings: Settings) -> "Tracing | None":
    """None unless the setting `tracing` is on. Everything else is OpenTelemetry's own `OTEL_…` environment.

    Raises StartupError where the SDK is not installed, InvalidSettings for an exporter that there is not.
    """
    if not settings.tracing:
        return None
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "otlp").strip() or "otlp"
    if exporter not in ("otlp", "none"):
        raise InvalidSettings(f"OTEL_TRACES_EXPORTER is '{exporter}'; traces are sent by 'otlp', or with 'none' not.")
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = os.environ.get(name, "").strip()
        if protocol not in ("", "http/protobuf"):
            raise InvalidSettings(f"{name} is '{protocol}'; traces are sent by 'http/protobuf' only.")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        command = install_command("opentelemetry.sdk", "opentelemetry.exporter")
        raise StartupError(f"Tracing needs OpenTelemetry's SDK. Install it with: {command}") from error
    provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
    if exporter == "otlp":
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


def _resource() -> "Resource":
    """Who sends: `manylora` of this version, unless the environment says otherwise."""
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    own = {"service.name": "manylora", "service.version": __version__}
    return Resource.create({**own, **OTELResourceDetector().detect().attributes})


class Tracing:
    """Draws the stations. `telemetry` is FastAPI's part of it; `close` sends what is left, and blocks."""

    def __init__(self, provider: "TracerProvider") -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("manylora", __version__)
        self.telemetry: TelemetryConfig = {
            "tracer_provider": provider,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "exclude": _is_polled,
        }

    def record(self, finished: RequestRecord) -> None:
        """An `api.record.Recorder`. The request's server span is the current one."""
        server = get_current_span()
        if not server.is_recording():
            return
        server.set_attributes(_attributes(finished))
        if finished.outcome == "error":
            server.set_status(Status(StatusCode.ERROR, finished.error.code if finished.error else None))
        now_s = time.monotonic()
        for prompt, progress in enumerate(finished.progress):
            marks = {} if len(finished.progress) == 1 else {"manylora.prompt": prompt}
            self._draw(server, stations(progress, now_s), marks)

    def _draw(self, server: Span, passed: Iterator[tuple[str, float, float]], marks: dict[str, Any]) -> None:
        context = set_span_in_context(server)
        offset_ns = time.time_ns() - time.monotonic_ns()
        for name, start_s, end_s in passed:
            start_ns, end_ns = (int(moment * _NANOSECONDS) + offset_ns for moment in (start_s, end_s))
            span = self._tracer.start_span(name, context, SpanKind.INTERNAL, attributes=marks, start_time=start_ns)
            span.end(end_ns)

    def close(self) -> None:
        self._provider.shutdown()


def stations(progress: Progress, now_s: float) -> Iterator[tuple[str, float, float]]:
    """(name, start, end) of each station that a request passed or was in when it ended, `now_s` at the latest."""
    end_s = now_s if progress.finished_s is None else progress.finished_s
    admitted_s = end_s if progress.scheduled_s is None else progress.scheduled_s
    loading_s = progress.load_started_s
    yield "queue", progress.arrived_s, admitted_s if loading_s is None else loading_s
    if loading_s is not None:
        yield "adapter load", loading_s, admitted_s if progress.load_ended_s is None else progress.load_ended_s
    if progress.scheduled_s is not None:
        yield "prefill", progress.scheduled_s, end_s if progress.first_token_s is None else progress.first_token_s
    if progress.first_token_s is not None:
        yield "decode", progress.first_token_s, max(progress.first_token_s, end_s)


def _attributes(finished: RequestRecord) -> dict[str, Any]:
    """Names of the conventions for generative AI where they have one."""
    attributes: dict[str, Any] = {
        "manylora.request_id": finished.request_id,
        "manylora.tenant": finished.tenant,
        "manylora.adapter": finished.adapter.label if finished.adapter else "base",
        "manylora.outcome": finished.outcome,
        "manylora.cached_tokens": finished.cached_tokens,
        "gen_ai.usage.input_tokens": finished.prompt_tokens,
        "gen_ai.usage.output_tokens": finished.completion_tokens,
    }
    if finished.ttft_s is not None:
        attributes["manylora.time_to_first_token_s"] = finished.ttft_s
    if finished.timing is not None:
        attributes["manylora.load_tier"] = finished.timing.load_tier
    return attributes


def _is_polled(scope: Scope) -> bool:
    return scope.get("path") in POLLED_PATHS
