"""From what the user calls a model to a frozen Whisper in memory, with its tokenizer and what its tokens mean."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from manylora.chat.format import FormatOverrides
from manylora.errors import ModelUnusable
from manylora.lora.format.encoders import SpeechModules
from manylora.models import backends, checkpoint
from manylora.models.loading import base_name, check_memory
from manylora.sound.reading import missing_packages
from manylora.sound.tokens import SpeechTokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from manylora.models.codec import HuggingFaceCodec
    from manylora.settings import Settings

__all__ = [
    "LoadedSpeech",
    "is_speech",
    "load_speech",
    "offered_speech_modules",
    "speech_backend",
    "tokens_of",
    "whisper_of",
]

_MODEL_TYPE: Final = "whisper"
_LANGUAGE: Final = re.compile(r"<\|([a-z]{2,3})\|>")


@dataclass(frozen=True, slots=True)
class LoadedSpeech:
    """A frozen Whisper in eval mode on its device, and what belongs to it. `name` is the served one."""

    model: "PreTrainedModel"
    codec: "HuggingFaceCodec"
    config: "PretrainedConfig"
    tokens: SpeechTokens
    name: str
    folder: Path
    backend: backends.Backend


def is_speech(folder: Path) -> bool:
    """Whether a checkpoint is a model of speech that is served here. False as well for what cannot be read."""
    try:
        return checkpoint.config_json(folder).get("model_type") == _MODEL_TYPE
    except ModelUnusable:
        return False


def speech_backend(settings: "Settings") -> backends.Backend:
    """What computes a model of speech, as the settings ask for it.

    Raises InvalidSettings, and ModelUnusable where packages are missing without which none is served.
    """
    if missing := missing_packages():
        raise ModelUnusable(missing)
    return backends.choose_whole(settings, "models of speech")


def load_speech(settings: "Settings", folder: Path) -> LoadedSpeech:
    """Check and load the Whisper in a folder. Raises ModelUnusable, NotEnoughMemory or InvalidSettings."""
    backend = speech_backend(settings)
    config = checkpoint.read_speech_config(folder)
    dtype = backends.select_dtype(settings.dtype, backend.device, getattr(config, "dtype", None))
    check_memory(folder, dtype, backend.device)
    tokenizer = checkpoint.load_tokenizer(folder)
    model = whisper_of(folder, config, dtype).to(backend.device)
    model.requires_grad_(False)
    model.eval()
    from manylora.models.codec import HuggingFaceCodec

    tokens = _tokens(model.generation_config, config)
    return LoadedSpeech(
        model=model,
        codec=HuggingFaceCodec(tokenizer, (tokens.end,), FormatOverrides()),
        config=config,
        tokens=tokens,
        name=settings.served_name or base_name(settings.model),
        folder=folder,
        backend=backend,
    )


def offered_speech_modules(folder: Path) -> SpeechModules:
    """What an adapter may touch of the Whisper in a folder, from its config alone. Raises ModelUnusable."""
    import torch
    import transformers

    from manylora.models.modules import adaptable_modules, adaptable_norms

    config = checkpoint.read_speech_config(folder)
    try:
        with torch.device("meta"):
            model = transformers.WhisperForConditionalGeneration(config)
    except (OSError, ValueError) as error:
        raise ModelUnusable(f"The config of {folder} cannot be used: {error}") from error
    modules = {path: replace(spec, grows=False) for path, spec in adaptable_modules(model).items()}
    return SpeechModules(modules | adaptable_norms(model))


def whisper_of(folder: Path, config: "PretrainedConfig", dtype: Any) -> "PreTrainedModel":
    """The model on the CPU, every weight from the files. Raises ModelUnusable."""
    import transformers

    checkpoint.refuse_coded(folder, checkpoint.stored_tensors(folder))
    model, info = checkpoint.from_folder(transformers.WhisperForConditionalGeneration, folder, config, dtype)
    for what, names in (("lack", info["missing_keys"]), ("have in excess", info["unexpected_keys"])):
        if names:
            raise ModelUnusable(f"The weights in {folder} {what} {checkpoint.some(sorted(map(str, names)))}.")
    if mismatched := sorted(str(entry[0]) for entry in info.get("mismatched_keys", ())):
        raise ModelUnusable(f"The weights in {folder} do not fit its config.json: {checkpoint.some(mismatched)}.")
    return model


def tokens_of(folder: Path, config: "PretrainedConfig") -> SpeechTokens:
    """What the checkpoint in a folder says of its special tokens. Raises ModelUnusable where it says too little."""
    import transformers

    try:
        return _tokens(transformers.GenerationConfig.from_pretrained(folder, local_files_only=True), config)
    except (OSError, ValueError) as error:
        raise ModelUnusable(f"generation_config.json in {folder} cannot be used: {error}") from error


def _tokens(said: Any, config: Any) -> SpeechTokens:
    """What a checkpoint says of its special tokens. Raises ModelUnusable where it says too little."""
    no_timestamps = getattr(said, "no_timestamps_token_id", None)
    end = said.eos_token_id if said.eos_token_id is not None else config.eos_token_id
    end = end[0] if isinstance(end, list) else end
    begin = said.decoder_start_token_id or config.decoder_start_token_id
    if not (isinstance(no_timestamps, int) and isinstance(end, int) and isinstance(begin, int)):
        raise ModelUnusable(
            "generation_config.json does not say which tokens begin a transcript, end it and ask for no timestamps "
            "(no_timestamps_token_id). Take the one that belongs to the checkpoint."
        )
    tasks = getattr(said, "task_to_id", None) or {}
    languages = {
        match[1]: int(number)
        for name, number in (getattr(said, "lang_to_id", None) or {}).items()
        if (match := _LANGUAGE.fullmatch(str(name)))
    }
    if bool(languages) != ("transcribe" in tasks):
        raise ModelUnusable("generation_config.json has languages without tasks, or tasks without languages.")
    return SpeechTokens(
        begin=int(begin),
        end=int(end),
        no_timestamps=int(no_timestamps),
        first_timestamp=int(no_timestamps) + 1,
        suppressed=tuple(said.suppress_tokens or ()),
        suppressed_first=tuple(said.begin_suppress_tokens or ()),
        max_first_timestamp=getattr(said, "max_initial_timestamp_index", None),
        before=getattr(said, "prev_sot_token_id", None),
        languages=languages,
        transcribe=tasks.get("transcribe"),
        translate=tasks.get("translate"),
    )
