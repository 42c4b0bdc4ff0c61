"""A form with a file of sound becomes a checked request. The file stays in memory, within the limit on bodies."""

from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final, Literal

from pydantic import Field
from starlette.requests import ClientDisconnect, Request

from manylora.api.record import ClientGone
from manylora.api.schemas import InferenceRequest, checked
from manylora.catalog.multipart import Form, read_form
from manylora.errors import InvalidAudio, InvalidRequest, TooLarge

__all__ = ["AudioRequest", "Upload", "received"]

MAX_PROMPT_CHARACTERS: Final = 4096
_GRANULARITIES: Final = "timestamp_granularities[]"
_BOOLEANS: Final = {"true": True, "True": True, "1": True, "false": False, "False": False, "0": False}
_MOST_BYTES: Final = 2**62  # the body's own limit comes first


class AudioRequest(InferenceRequest):
    """The fields of a form beside its file."""

    prompt_field = "file"

    language: str | None = Field(default=None, max_length=16)
    prompt: str | None = Field(default=None, max_length=MAX_PROMPT_CHARACTERS)
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt"] = "json"
    temperature: float | None = Field(default=None, ge=0, le=1)
    timestamp_granularities: Literal["segment"] | None = None
    stream: bool = False

    @property
    def has_timestamps(self) -> bool:
        """Whether the model is asked when something is said."""
        return self.response_format in ("srt", "verbose_json", "vtt")

    @property
    def is_streamed(self) -> bool:
        return self.stream


@dataclass(frozen=True, slots=True)
class Upload:
    """A form's fields, and its file."""

    body: AudioRequest
    sound: bytes


class _SoundForm(Form):
    """Keeps the part `file` in memory."""

    def __init__(self, known: frozenset[str]) -> None:
        super().__init__(known)
        self.sound: _Kept | None = None

    def open_part(self, name: str, filename: str) -> None:
        if name != "file":
            super().open_part(name, filename)
        elif self.sound is not None:
            self.refuse(InvalidRequest("The field 'file' is given twice.", param="file"))
        else:
            self.sound = _Kept()
            self.write_into(self.sound)


class _Kept(BytesIO):
    """What is written stays when the form closes its files."""

    def close(self) -> None:
        self.seek(0)


async def received(request: Request, names: Collection[str]) -> Upload:
    """The form of a request, which has fields of these names. Raises InvalidRequest, TooLarge or ClientGone."""
    form = _SoundForm(frozenset(names) - {"file"})
    kind = request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        raise InvalidRequest("Send the file as multipart/form-data, with the fields 'file' and 'model'.")
    try:
        await read_form(_chunks(request), kind, form, max_bytes=_MOST_BYTES, content_length=None, too_large=_too_large)
    except ClientDisconnect:
        raise ClientGone from None
    body = checked(AudioRequest, _values(form.fields))
    if body.stream and body.response_format not in ("json", "text"):
        raise InvalidRequest("'stream' goes with the 'response_format' json or text.", param="stream")
    if body.timestamp_granularities is not None and body.response_format != "verbose_json":
        raise InvalidRequest(f"'{_GRANULARITIES}' goes with the 'response_format' verbose_json.", param=_GRANULARITIES)
    if form.sound is None:
        raise InvalidRequest("The field 'file' is required: the sound to write down.", param="file")
    sound = form.sound.getvalue()
    if not sound:
        raise InvalidAudio("'file' is empty. Send a file with sound in it.", param="file")
    return Upload(body, sound)


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    async for chunk in request.stream():
        if chunk:
            yield chunk


def _too_large() -> TooLarge:
    return TooLarge("The body is too large.")


def _values(fields: dict[str, str]) -> dict[str, Any]:
    """The texts of a form as what they say. Raises InvalidRequest."""
    found: dict[str, Any] = {name: text for name, text in fields.items() if text or name == "model"}
    if "temperature" in found:
        try:
            found["temperature"] = float(found["temperature"])
        except ValueError:
            raise InvalidRequest("'temperature' must be a number.", param="temperature") from None
    if "stream" in found:
        if found["stream"] not in _BOOLEANS:
            raise InvalidRequest("'stream' must be true or false.", param="stream")
        found["stream"] = _BOOLEANS[found["stream"]]
    if _GRANULARITIES in found:
        if found[_GRANULARITIES] != "segment":
            raise InvalidRequest(
                f"'{_GRANULARITIES}' can be 'segment' alone: words have no times here.", param=_GRANULARITIES
            )
        found["timestamp_granularities"] = found.pop(_GRANULARITIES)
    return found
