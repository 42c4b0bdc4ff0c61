"""Logging: one format for our lines and the libraries'."""

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from manylora.log import configure_logging, get_logger


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


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
