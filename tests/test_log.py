"""Logging: one format for our lines and the libraries'."""

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog
from opentelemetry import trace

from manylora.log import RecentLines, configure_logging, get_logger


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, structured = list(root.handlers), root.level, structlog.get_config()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.configure(**structured)


def test_json_lines_carry_fields_and_level() -> None:
    stream = io.StringIO()
    configure_logging(level="info", as_json=True, stream=stream)
    get_logger("manylora.x").info("request", tenant="acme", tokens=3)
    line = json.loads(stream.getvalue())
    assert (line["event"], line["tenant"], line["tokens"], line["level"]) == ("request", "acme", 3, "info")
    assert line["logger"] == "manylora.x"
    assert line["timestamp"].endswith("Z")


def test_the_libraries_lines_have_the_same_form() -> None:
    stream = io.StringIO()
    configure_logging(level="info", as_json=True, stream=stream)
    logging.getLogger("uvicorn.error").info("Started %s", "x", extra={"port": 5})
    line = json.loads(stream.getvalue())
    assert (line["event"], line["port"]) == ("Started x", 5)


def test_exceptions_are_one_json_line_with_the_traceback() -> None:
    stream = io.StringIO()
    configure_logging(level="info", as_json=True, stream=stream)
    try:
        int("broken")
    except ValueError:
        get_logger("manylora.x").exception("failed")
    (line,) = stream.getvalue().splitlines()
    assert "ValueError: invalid literal" in json.loads(line)["exception"]


def test_lines_of_requests_are_remembered_as_text_and_only_the_newest() -> None:
    recent = RecentLines(2)
    for number, request_id in enumerate(("a", None, "b", "a", "a")):
        event = {"event": "x" * number, "request_id": request_id, "what": recent, "much": "y" * 9000, "number": number}
        assert recent.note(None, "info", event) is event
    assert [line["fields"]["number"] for line in recent.of("a")] == [3, 4]
    assert recent.of("b") == []
    (line, _) = recent.of("a")
    assert isinstance(line["fields"]["what"], str)
    assert len(line["fields"]["much"]) < 9000


def test_lines_below_the_level_are_dropped() -> None:
    stream = io.StringIO()
    configure_logging(level="warning", as_json=True, stream=stream)
    get_logger("manylora.x").info("quiet")
    logging.getLogger("other").info("quiet")
    assert stream.getvalue() == ""


def test_text_for_people_has_no_colour_codes_in_a_file() -> None:
    stream = io.StringIO()
    configure_logging(level="info", as_json=False, stream=stream)
    get_logger("manylora.x").info("request", tenant="acme")
    assert "tenant=acme" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


HOSTILE = "x\nrequest tenant=admin \x1b[2J \u202e"


def test_what_strangers_send_stays_in_its_line_and_commands_no_terminal() -> None:
    stream = io.StringIO()
    configure_logging(level="info", as_json=False, stream=stream)
    get_logger("manylora.x").info("request", user=HOSTILE, path="/a\nb", metadata={"k": HOSTILE})
    logging.getLogger("other").warning("Lost: %s", HOSTILE)
    assert len(stream.getvalue().splitlines()) == 2
    assert not {"\x1b", "\u202e"} & set(stream.getvalue())


@pytest.mark.parametrize("as_json", [False, True])
def test_tracebacks_show_code_and_no_values(as_json: bool) -> None:
    stream = io.StringIO()
    configure_logging(level="info", as_json=as_json, stream=stream)

    def fail(prompt: str) -> float:
        return len(prompt) / 0

    prompt = "sec" + "ret"
    try:
        fail(prompt)
    except ZeroDivisionError:
        get_logger("manylora.x").exception("failed")
    text = stream.getvalue()
    assert "return len(prompt) / 0" in text
    assert "ZeroDivisionError" in text
    assert "secret" not in text


def test_an_exceptions_message_commands_no_terminal() -> None:
    stream = io.StringIO()
    configure_logging(level="info", as_json=False, stream=stream)

    def fail() -> None:
        raise ValueError(HOSTILE)

    try:
        fail()
    except ValueError:
        logging.getLogger("other").exception("failed")
    assert not {"\x1b", "\u202e"} & set(stream.getvalue())
    assert stream.getvalue().endswith("\n")


def test_lines_within_a_traced_request_name_its_trace() -> None:
    stream = io.StringIO()
    configure_logging(level="info", as_json=True, stream=stream)
    context = trace.SpanContext(0xA1, 0xB2, is_remote=False)
    with trace.use_span(trace.NonRecordingSpan(context)):
        get_logger("manylora.x").info("within")
    get_logger("manylora.x").info("without")
    within, without = map(json.loads, stream.getvalue().splitlines())
    assert (within["trace_id"], within["span_id"]) == (f"{0xA1:032x}", f"{0xB2:016x}")
    assert "trace_id" not in without
