"""`/v1/audio/transcriptions` and `/v1/audio/translations`: what is said in a file, as OpenAI's routes give it."""

from functools import partial
from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from manylora.api.audio_form import AudioRequest, received
from manylora.api.auth import Caller
from manylora.api.defaults import with_defaults
from manylora.api.lanes import MEDIA
from manylora.api.naming import asker, looked_up, missing, named_by
from manylora.api.record import ClientGone
from manylora.api.requests import Prompt
from manylora.api.run import Run
from manylora.api.state import Services, ServicesDep
from manylora.api.transcripts import MEDIA_TYPES, TranscriptAnswer
from manylora.engine.interface import ModelInfo, SamplingParams, Sound, SpeechForm, SpeechInfo, TextCodec
from manylora.errors import InvalidRequest, WrongModelType, quoted
from manylora.sound.reading import read
from manylora.sound.spectrogram import spectrogram
from manylora.sound.windows import Window, windows
from manylora.tenants.interface import Principal

__all__ = ["router"]

router = APIRouter(tags=["inference"])
_FIELDS: Final = {
    "file": {"type": "string", "format": "binary", "description": "WAV, FLAC, Ogg, MP3 or AIFF"},
    "model": {"type": "string", "description": "The base or an adapter."},
    "adapter_id": {"type": "string", "description": "LoRAX's way to name an adapter."},
    "prompt": {"type": "string", "description": "What was said before, or words in the spelling that is wanted."},
    "response_format": {"type": "string", "enum": list(MEDIA_TYPES)},
    "temperature": {"type": "number", "minimum": 0, "maximum": 1},
}
_OF_TRANSCRIPTS: Final = {
    "language": {"type": "string", "description": "A code of ISO 639-1; found out where it is absent."},
    "timestamp_granularities[]": {"type": "string", "enum": ["segment"]},
    "stream": {"type": "boolean"},
}


def _documented(properties: dict[str, object]) -> dict[str, object]:
    schema = {"type": "object", "required": ["file"], "properties": properties}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


@router.post("/v1/audio/transcriptions", openapi_extra=_documented(_FIELDS | _OF_TRANSCRIPTS))
async def create_transcription(request: Request, caller: Caller, services: ServicesDep) -> Response:
    """What is said in a file, in its own language."""
    run = Run(request, caller, services)
    async with run.ends_on_error():
        return await _written_down(run, request, services, caller, task="transcribe")


@router.post("/v1/audio/translations", openapi_extra=_documented(_FIELDS))
async def create_translation(request: Request, caller: Caller, services: ServicesDep) -> Response:
    """What is said in a file, in English."""
    run = Run(request, caller, services)
    async with run.ends_on_error():
        return await _written_down(run, request, services, caller, task="translate")


async def _written_down(run: Run, request: Request, services: Services, caller: Principal, *, task: str) -> Response:
    """The response to a form of either route."""
    speech = _speech_of(services.engine.model)
    upload = await received(request, _FIELDS | (_OF_TRANSCRIPTS if task == "transcribe" else {}))
    body = upload.body
    run.log.update(body.annotations())
    _check(body, speech, task)
    find = partial(
        named_by,
        body,
        services.directory,
        caller.tenant,
        services.engine.model.name,
        services.settings.resolved_model_aliases,
        who=asker(body, caller),
    )
    run.named = await looked_up(find, services.following)
    with_defaults(body, services.directory, run.named)  # of which a transcript has none, but some may be locked
    heard, prompts = await MEDIA.run(
        caller.tenant,
        _prompts,
        upload.sound,
        body,
        services.engine.model,
        services.engine.codec,
        task,
        services.engine.max_choices,
    )
    del upload
    num_bytes = sum(prompt.sound.spectrogram.nbytes for prompt in prompts if prompt.sound is not None)
    services.presence.hold(request.scope["manylora.visit"], num_bytes)
    if await request.is_disconnected():
        raise ClientGone
    run.ask(prompts, gone=missing(body))
    answer = TranscriptAnswer(run, body, speech, heard, task)
    return await run.answer(answer, is_streamed=body.is_streamed, media_type=MEDIA_TYPES[body.response_format])


def _speech_of(model: ModelInfo) -> SpeechInfo:
    if model.speech is None:
        kind = "an encoder" if model.kind == "pool" else "a decoder of text"
        raise WrongModelType(
            f"This server's model is {kind}: it hears nothing. Ask a server of a model of speech (Whisper)."
        )
    return model.speech


def _check(body: AudioRequest, speech: SpeechInfo, task: str) -> None:
    """Raises InvalidRequest for what this model of speech does not do."""
    languages = speech.tokens.languages
    if task == "translate" and not languages:
        raise WrongModelType("This server's model knows English alone, so it translates nothing.")
    if body.language is not None and body.language not in (languages or ("en",)):
        known = "English alone ('en')" if not languages else f"{len(languages)} languages, by their codes, as 'en'"
        raise InvalidRequest(
            f"'language' is '{quoted(body.language)}', and this server's model knows {known}.", param="language"
        )
    if body.prompt is not None and speech.tokens.before is None:
        raise InvalidRequest("This server's model takes no 'prompt'. Leave it out.", param="prompt")


def _prompts(
    sound: bytes, body: AudioRequest, model: ModelInfo, codec: TextCodec, task: str, most: int
) -> tuple[tuple[Window, ...], tuple[Prompt, ...]]:
    """The file's windows, and what is asked of each. Raises InvalidRequest.

    Of the samples no more is in memory than a window's: each becomes its spectrogram at once.
    """
    speech = model.speech
    assert speech is not None
    ids, form = _begun(body, speech, codec, model.context_length, task)
    params = SamplingParams(
        max_tokens=model.context_length - len(ids),
        temperature=body.temperature or 0.0,
        logprobs=0 if body.response_format == "verbose_json" else None,
        speech=form,
    )
    heard, prompts = list[Window](), list[Prompt]()
    for window, samples in windows(read(sound), speech.window_s):
        if len(heard) == most:
            raise InvalidRequest(
                f"'file' is written down in windows of {speech.window_s:g} seconds; at most {most} are queued here, "
                "and it has more. Send less.",
                param="file",
            )
        seen = Sound(spectrogram(samples, speech.num_mels, speech.window_s), speech.num_positions)
        heard.append(window)
        prompts.append(Prompt(ids, params, sound=seen, sound_s=window.seconds))
    return tuple(heard), tuple(prompts)


def _begun(
    body: AudioRequest, speech: SpeechInfo, codec: TextCodec, context_length: int, task: str
) -> tuple[tuple[int, ...], SpeechForm]:
    """The tokens that a transcript begins with, and what it looks like from there on."""
    tokens, ids = speech.tokens, list[int]()
    if body.prompt is not None:
        assert tokens.before is not None
        said = codec.encode(f" {body.prompt.strip()}", add_special_tokens=False)
        if max(said, default=0) >= tokens.end:
            raise InvalidRequest("'prompt' has a special token of the model. Leave it out.", param="prompt")
        ids += [tokens.before, *said[-(context_length // 2 - 1) :]]
    ids.append(tokens.begin)
    asks_times = body.has_timestamps
    after: list[tuple[int, ...]] = []
    if tokens.languages:
        wanted = tokens.transcribe if task == "transcribe" else tokens.translate
        assert wanted is not None
        language = tuple(tokens.languages.values()) if body.language is None else (tokens.languages[body.language],)
        after += [language, (wanted,)]
    if not asks_times:
        after.append((tokens.no_timestamps,))
    while after and len(after[0]) == 1:  # what is known already need not be chosen
        ids += after.pop(0)
    return tuple(ids), SpeechForm(tokens, tuple(after), has_timestamps=asks_times)
