"""Logging: structlog for our own lines and the standard library's, one format for both.

One line for each request, and no prompt text unless the setting `log_prompts` asks for it: so a traceback shows
lines of code and never the values of variables. What comes from strangers cannot forge a line or command a terminal.
"""

import logging
import sys
import traceback
from collections import deque
from collections.abc import Mapping
from typing import Any, Final, TextIO

import structlog
from opentelemetry import trace
from structlog.typing import EventDict, ExcInfo, Processor

__all__ = ["NUM_REMEMBERED_LINES", "RECENT", "RecentLines", "configure_logging", "get_logger"]

NUM_REMEMBERED_LINES: Final = 5000
_VALUE_LENGTH: Final = 2000  # characters of a line's field that are remembered
_OWN_FIELDS: Final = ("timestamp", "level", "event", "exc_info")

# Loggers that say in many lines what one of ours says in one, or that would write the URLs of stored files.
_QUIET = ("httpx", "httpcore", "uvicorn.access", "urllib3", "botocore", "aiobotocore", "fsspec", "alembic")


def _without_colour_copy(_logger: object, _method: str, event: EventDict) -> EventDict:
    """uvicorn sends each message a second time, coloured."""
    event.pop("color_message", None)
    return event


def _with_trace_ids(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Which trace a line belongs to, while requests are traced."""
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = trace.format_trace_id(context.trace_id)
        event["span_id"] = trace.format_span_id(context.span_id)
    return event


def _in_one_line(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Line breaks and what else a terminal would act on as escapes; JSON has them anyway, and so has `repr`."""
    for name, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[name] = _escaped(value)
    return event


def _escaped(text: str, *, keep: str = "") -> str:
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def _write_traceback(out: TextIO, info: ExcInfo) -> None:
    """Without the local variables that structlog's own would print: prompts are among them."""
    text = "".join(traceback.format_exception(*info))
    out.write("\n" + _escaped(text, keep="\n").rstrip("\n"))


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A structlog logger over the standard library's logger `name`."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


class RecentLines:
    """The newest lines of this process that belong to a request, for whoever asks for one request's.

    Threads may write while one reads: a `deque` takes and gives whole entries.
    """

    def __init__(self, most: int = NUM_REMEMBERED_LINES) -> None:
        self._lines: deque[dict[str, Any]] = deque(maxlen=most)

    def note(self, _logger: object, _method: str, event: EventDict) -> EventDict:
        """As a processor of structlog: keep what the line says, as text, so that no frame or object lives on in it."""
        if event.get("request_id") is not None:
            fields = {name: _remembered(value) for name, value in event.items() if name not in _OWN_FIELDS}
            if event.get("exc_info"):
                fields["traceback"] = _traceback_of(event["exc_info"])
            self._lines.append({**{name: str(event.get(name, "")) for name in _OWN_FIELDS[:3]}, "fields": fields})
        return event

    def of(self, request_id: str) -> list[Mapping[str, Any]]:
        """The lines of one request, oldest first: {timestamp, level, event, fields}."""
        return [line for line in list(self._lines) if line["fields"]["request_id"] == request_id]


RECENT: Final = RecentLines()


def _remembered(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | None) else str(value)[:_VALUE_LENGTH]


def _traceback_of(info: Any) -> str:
    """The end of a traceback, which says most.

    `info` as loggers take it: an exception, a triple, or True for the one in the air.
    """
    if isinstance(info, BaseException):
        info = (type(info), info, info.__traceback__)
    triple = info if isinstance(info, tuple) else sys.exc_info()
    return "".join(traceback.format_exception(*triple))[-_VALUE_LENGTH:]


def configure_logging(*, level: str, as_json: bool, stream: TextIO | None = None) -> None:
    """Send everything to `stream` (default: standard error), as JSON lines or coloured text."""
    target = stream or sys.stderr
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        _without_colour_copy,
        _with_trace_ids,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    renderers: list[Any] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, RECENT.note]
    if as_json:
        renderers += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        text = structlog.dev.ConsoleRenderer(colors=target.isatty(), exception_formatter=_write_traceback)
        renderers += [_in_one_line, text]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(target)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processors=renderers, foreign_pre_chain=shared))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
