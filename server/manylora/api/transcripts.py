"""Transcripts as OpenAI's audio routes give them: JSON, plain text, subtitles, or events."""

import math
import zlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from manylora.api.answers import extension
from manylora.api.audio_form import AudioRequest
from manylora.api.errors import error_json
from manylora.api.run import Deltas, Run
from manylora.api.sse import Event
from manylora.engine.interface import Delta, SpeechInfo, TokenLogprob
from manylora.errors import ManyloraError
from manylora.sound.tokens import SECONDS_PER_TIMESTAMP
from manylora.sound.windows import Window

__all__ = ["MEDIA_TYPES", "TranscriptAnswer"]

_TEXT: Final = "text/plain; charset=utf-8"
_JSON: Final = "application/json"
MEDIA_TYPES: Final[Mapping[str, str]] = {
    "json": _JSON,
    "text": _TEXT,
    "srt": _TEXT,
    "verbose_json": _JSON,
    "vtt": _TEXT,
}


@dataclass(slots=True)
class _Written:
    """What was written down of one window."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Segment:
    """A stretch of the transcript, from and to these seconds of the file."""

    start_s: float
    end_s: float
    token_ids: tuple[int, ...]
    text: str
    logprob: float
    seek: int


class TranscriptAnswer:
    """Puts the windows' tokens together. Implements `run.Renderer`."""

    def __init__(self, run: Run, body: AudioRequest, speech: SpeechInfo, windows: Sequence[Window], task: str) -> None:
        self._run = run
        self._body = body
        self._tokens = speech.tokens
        self._windows = windows
        self._task = task
        self._codec = run.services.engine.codec
        self._written = [_Written() for _ in windows]
        self._has_begun = False

    def arranged(self, deltas: Deltas) -> Deltas:
        return self._in_order(deltas) if self._body.is_streamed else deltas

    async def _in_order(self, deltas: Deltas) -> AsyncGenerator[tuple[int, Delta], None]:
        """Window after window: what later ones are given waits until those before have ended."""
        current, waiting = 0, list[list[Delta]]([[] for _ in self._windows])
        async for window, delta in deltas:
            waiting[window].append(delta)
            while current < len(waiting) and waiting[current]:
                given = waiting[current].pop(0)
                yield current, given
                current += given.finish_reason is not None

    async def keep(self, choice: int, logprobs: Sequence[TokenLogprob]) -> None:
        self._written[choice].logprobs += logprobs

    def add(self, choice: int, delta: Delta) -> None:
        self._written[choice].token_ids += delta.token_ids

    def whole(self) -> bytes:
        make: Mapping[str, Callable[[], bytes]] = {
            "json": self._json,
            "text": self._plain,
            "verbose_json": self._verbose_json,
            "srt": self._srt,
            "vtt": self._vtt,
        }
        return make[self._body.response_format]()

    def events(self, choice: int, delta: Delta) -> Sequence[Event]:
        self.add(choice, delta)
        text = delta.text if self._has_begun else delta.text.lstrip()
        if not text:
            return ()
        self._has_begun = True
        return (orjson.dumps({"type": "transcript.text.delta", "delta": text}),)

    def last_events(self) -> Sequence[Event]:
        return (orjson.dumps({"type": "transcript.text.done", "text": self._text(), "usage": self._usage()}),)

    def failed(self, error: ManyloraError) -> Sequence[Event]:
        return (error_json(error),)

    # parts

    def _decoded(self, token_ids: Sequence[int]) -> str:
        return self._codec.decode([each for each in token_ids if each < self._tokens.end])

    def _text(self) -> str:
        return "".join(self._decoded(each.token_ids) for each in self._written).strip()

    def _seconds(self) -> float:
        return sum(window.seconds for window in self._windows)

    def _usage(self) -> dict[str, Any]:
        return {"type": "duration", "seconds": math.ceil(self._seconds())}

    def _language(self) -> str:
        """The one that was asked for, or heard in the first window."""
        if self._body.language is not None or not self._tokens.languages:
            return self._body.language or "en"
        first = self._written[0].token_ids[0]
        return next((code for code, token in self._tokens.languages.items() if token == first), "")

    def _segments(self) -> list[_Segment]:
        return [
            segment
            for window, written in zip(self._windows, self._written, strict=True)
            for segment in self._segments_of(window, written)
        ]

    def _segments_of(self, window: Window, written: _Written) -> list[_Segment]:
        """The stretches between times; the last may have none at its end."""
        found: list[_Segment] = []
        start, ids, sums = 0.0, list[int](), list[float]()

        def end(at: float) -> None:
            if ids:
                text = self._decoded(ids)
                mean = sum(sums) / len(sums) if sums else 0.0
                first, last = (min(each, window.seconds) + window.start_s for each in (start, max(start, at)))
                found.append(_Segment(first, last, tuple(ids), text, mean, int(window.start_s * 100)))
            ids.clear()
            sums.clear()

        for number, token in enumerate(written.token_ids):
            if token >= self._tokens.first_timestamp:
                at = (token - self._tokens.first_timestamp) * SECONDS_PER_TIMESTAMP
                end(at)
                start = at
            elif token < self._tokens.end:
                ids.append(token)
                if number < len(written.logprobs):
                    sums.append(written.logprobs[number].logprob or 0.0)
        end(window.seconds)
        return found

    # forms

    def _plain(self) -> bytes:
        return f"{self._text()}\n".encode()

    def _json(self) -> bytes:
        return orjson.dumps({"text": self._text(), "usage": self._usage(), "manylora": extension(self._run)})

    def _verbose_json(self) -> bytes:
        segments = [
            {
                "id": number,
                "seek": each.seek,
                "start": round(each.start_s, 2),
                "end": round(each.end_s, 2),
                "text": each.text,
                "tokens": each.token_ids,
                "temperature": self._body.temperature or 0.0,
                "avg_logprob": each.logprob,
                "compression_ratio": _compression(each.text),
                "no_speech_prob": None,
            }
            for number, each in enumerate(self._segments())
        ]
        return orjson.dumps(
            {
                "task": self._task,
                "language": self._language(),
                "duration": round(self._seconds(), 2),
                "text": self._text(),
                "segments": segments,
                "usage": self._usage(),
                "manylora": extension(self._run),
            }
        )

    def _shown(self) -> list[_Segment]:
        """The segments that have something to read."""
        return [each for each in self._segments() if each.text.strip()]

    def _srt(self) -> bytes:
        blocks = [
            f"{number}\n{_clock(each.start_s, ',')} --> {_clock(each.end_s, ',')}\n{_line(each.text)}\n\n"
            for number, each in enumerate(self._shown(), start=1)
        ]
        return "".join(blocks).encode()

    def _vtt(self) -> bytes:
        blocks = [
            f"{_clock(each.start_s, '.')} --> {_clock(each.end_s, '.')}\n{_line(each.text)}\n\n"
            for each in self._shown()
        ]
        return "".join(["WEBVTT\n\n", *blocks]).encode()


def _compression(text: str) -> float:
    """How often a text repeats itself: its size by what zlib makes of it."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))


def _clock(seconds: float, point: str) -> str:
    thousandths = round(seconds * 1000)
    minutes, rest = divmod(thousandths, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"


def _line(text: str) -> str:
    """A text as subtitles can hold it: an arrow would end the block's line of times."""
    return text.strip().replace("-->", "->")
