"""Reads OpenAI's stream of server-sent events.

An answer is good only when it was complete: no error event, a finish reason, `[DONE]`.
"""

from typing import Any, Final

import orjson

from manylora_loadtest.results import OK, RequestResult

__all__ = ["StreamReader", "authorization", "error_message", "short"]

_ERROR_CHARS: Final = 300


class StreamReader:
    """Reads OpenAI's stream of server-sent events into a result."""

    def __init__(self, result: RequestResult) -> None:
        self._result = result
        self._rest = b""
        self._is_finished = False  # a finish reason came
        self._is_done = False  # [DONE] came

    def feed(self, data: bytes, now_s: float) -> None:
        """`data` arrived at `now_s`; events may be split anywhere."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now_s)

    def end(self) -> None:
        """The response ended. Decides the outcome."""
        result = self._result
        if result.outcome:
            return
        if self._is_done and self._is_finished:
            result.outcome = OK
        else:
            missing = "[DONE]" if self._is_finished else "a finish reason"
            result.outcome, result.error = "cut_off", f"the stream ended without {missing}"

    def _event(self, payload: bytes, now_s: float) -> None:
        if payload == b"[DONE]":
            self._is_done = True
            return
        try:
            event = orjson.loads(payload)
            if event.get("error"):
                self._result.outcome, self._result.error = "stream_error", error_message(payload)
                return
            self._choices(event.get("choices") or [], now_s)
            if usage := event.get("usage"):
                self._result.prompt_tokens = usage["prompt_tokens"]
                self._result.output_tokens = usage["completion_tokens"]
            if extension := event.get("manylora"):
                self._extension(extension)
        except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError, IndexError) as error:
            self._result.outcome, self._result.error = "bad_answer", short(f"{error!r} in {payload!r}")

    def _choices(self, choices: list[dict[str, Any]], now_s: float) -> None:
        result = self._result
        for choice in choices:
            is_end = choice.get("finish_reason") is not None
            self._is_finished |= is_end
            delta = choice.get("delta")
            has_text = bool(choice.get("text")) if delta is None else any(delta.get(k) for k in _TEXT_FIELDS)
            if not has_text and not (is_end and result.first_s is None):
                continue  # a role, or an end without text; an answer of no text at all still has a first event
            result.num_events += 1
            if result.first_s is None:
                result.first_s = now_s
            elif result.last_s is not None:
                result.max_gap_s = max(result.max_gap_s, now_s - result.last_s)
            result.last_s = now_s

    def _extension(self, extension: dict[str, Any]) -> None:
        """manylora says in the last event where the adapter was and how long the request waited."""
        result = self._result
        result.version = (extension.get("adapter") or {}).get("version")
        result.load_tier = extension.get("load_tier")
        result.queue_s = _seconds(extension.get("queue_ms"))
        result.load_s = _seconds(extension.get("load_ms"))


_TEXT_FIELDS: Final = ("content", "reasoning_content", "reasoning", "tool_calls", "refusal")


def authorization(key: str | None) -> dict[str, str]:
    """The header that carries `key`; none without a key."""
    return {"authorization": f"Bearer {key}"} if key else {}


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def error_message(body: bytes) -> str:
    """An error answer's message, from OpenAI's shape, or the body itself."""
    try:
        error = orjson.loads(body)["error"]
        return short(str(error["message"] if isinstance(error, dict) else error))
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return short(body.decode("utf-8", "replace"))


def short(text: str) -> str:
    return text if len(text) <= _ERROR_CHARS else text[: _ERROR_CHARS - 1] + "…"
