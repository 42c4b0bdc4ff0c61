"""A tiny random Whisper that hears windows of one second, adapters that PEFT writes for it, and sounds."""

import io
import warnings
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import httpx2
import numpy as np
import numpy.typing as npt
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperTimeStampLogitsProcessor,
)

from manylora.sound.reading import RATE, Samples
from manylora.sound.spectrogram import spectrogram
from tests.encoders.tiny import Served
from tests.tiny_models import VOCAB_SIZE, draw_weights, make_tokenizer

LANGUAGES: Final = ("en", "de", "zh")
POSITIONS: Final = 50
NUM_MELS: Final = 16
NUM_TIMES: Final = POSITIONS + 1
SPECIAL: Final = (
    "<|eot|>",
    "<|startoftranscript|>",
    *(f"<|{code}|>" for code in LANGUAGES),
    "<|translate|>",
    "<|transcribe|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
)
IDS: Final = {name: VOCAB_SIZE + number for number, name in enumerate(SPECIAL)}
END, BEGIN, NO_TIMES = IDS["<|eot|>"], IDS["<|startoftranscript|>"], IDS["<|notimestamps|>"]
FIRST_TIME: Final = NO_TIMES + 1
CONTEXT: Final = 48
# Of each adapter: rank, and what it adapts.
TUNED: Final[dict[str, tuple[int, Any]]] = {
    "all": (4, "all-linear"),
    "usual": (8, ["q_proj", "v_proj"]),
    "encoder": (3, r".*encoder\.layers.*(k_proj|out_proj|fc1)"),
    "decoder": (2, r".*decoder\.layers.*(fc1|fc2|self_attn\.k_proj)"),
    "cross": (5, r".*encoder_attn\.(q|k|v|out)_proj"),
    "words": (2, r".*(decoder\.embed_tokens|decoder\.layers\.1\.fc2)"),
    "convolution": (2, ["conv1", "q_proj"]),
    "first": (1, r".*encoder\.layers\.0\..*(q_proj|fc2)"),
}


def make_whisper(folder: Path, *, is_multilingual: bool = True, seed: int = 0, **overrides: Any) -> Path:
    """Save a random Whisper with its tokenizer; returns the folder."""
    ids = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": END, "decoder_start_token_id": BEGIN}
    config = WhisperConfig(
        vocab_size=FIRST_TIME + NUM_TIMES,
        num_mel_bins=NUM_MELS,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=POSITIONS,
        max_target_positions=CONTEXT,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **ids,
        **overrides,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WhisperForConditionalGeneration(config)
        draw_weights(model)
        with torch.no_grad():  # else it would write the same token again and again
            model.model.decoder.embed_positions.weight.normal_(0.0, 1.0)
            model.model.encoder.conv1.weight.mul_(0.2)
    said: dict[str, Any] = {
        **ids,
        "is_multilingual": is_multilingual,
        "no_timestamps_token_id": NO_TIMES,
        "prev_sot_token_id": IDS["<|startofprev|>"],
        "max_initial_timestamp_index": 20,
        "max_length": CONTEXT,
        "return_timestamps": False,
        "suppress_tokens": [5, 9, 77, *(IDS[f"<|{name}|>"] for name in ("startoftranscript", "nospeech"))],
        "begin_suppress_tokens": [33, END],
    }
    if is_multilingual:
        said["lang_to_id"] = {f"<|{code}|>": IDS[f"<|{code}|>"] for code in LANGUAGES}
        said["task_to_id"] = {name: IDS[f"<|{name}|>"] for name in ("transcribe", "translate")}
    model.generation_config = GenerationConfig(**said)
    model.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.save_pretrained(folder)
    return folder


def make_speech_adapter(base: Path, folder: Path, name: str, *, seed: int = 0) -> Path:
    """Save an adapter of `TUNED` that PEFT writes, with random weights."""
    rank, targets = TUNED[name]
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(
            WhisperForConditionalGeneration.from_pretrained(base),
            LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets),
        )
        with torch.no_grad():
            for weight in tuned.parameters():
                if weight.requires_grad:
                    weight.normal_(0.0, (0.5 / weight.shape[-1]) ** 0.5)
        tuned.save_pretrained(folder)
    return folder


def oracle(base: Path, adapter: Path | None = None) -> Any:
    """Transformers' model in float32, with PEFT's adapter where there is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = WhisperForConditionalGeneration.from_pretrained(base)
        return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()


@torch.inference_mode()
def generated(
    model: Any,
    samples: Samples,
    *,
    language: str | None = "en",
    task: str = "transcribe",
    prompt: tuple[int, ...] = (),
    has_times: bool = False,
) -> list[int]:
    """The tokens that transformers' `generate` writes down of a window by Whisper's rules, without the end's.

    Whisper's own `generate` goes on behind the last time in a window; this is one pass of it, with its processors.
    """
    whisper = model.get_base_model() if isinstance(model, PeftModel) else model
    said = whisper.generation_config
    ids = [*prompt, BEGIN]
    if language is not None:
        ids += [IDS[f"<|{language}|>"], IDS[f"<|{task}|>"]]
    ids += [] if has_times else [NO_TIMES]
    rules = [
        SuppressTokensAtBeginLogitsProcessor(said.begin_suppress_tokens, len(ids)),
        SuppressTokensLogitsProcessor(said.suppress_tokens),
        *([WhisperTimeStampLogitsProcessor(said, len(ids))] if has_times else []),
    ]
    plain = GenerationConfig(
        do_sample=False, max_length=CONTEXT, eos_token_id=END, pad_token_id=END, decoder_start_token_id=BEGIN
    )
    features = torch.from_numpy(spectrogram(samples, NUM_MELS, 1.0))[None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = GenerationMixin.generate(
            whisper,
            features,
            generation_config=plain,
            logits_processor=LogitsProcessorList(rules),
            decoder_input_ids=torch.tensor([ids]),
        )[0].tolist()
    return [each for each in found[len(ids) :] if each != END]


def sound(seed: int = 0, seconds: float = 0.8) -> Samples:
    """Noise that swells and fades, different for each seed."""
    random = np.random.default_rng(seed)
    count = int(seconds * RATE)
    at = np.arange(count) / RATE
    tone = np.sin(2 * np.pi * (200 + 150 * seed) * at * (1 + 0.3 * at))
    whole: Samples = (0.3 * tone * np.sin(3 * at) ** 2 + 0.05 * random.standard_normal(count)).astype(np.float32)
    return whole


def wav(samples: Samples, *, rate: int = RATE, channels: int = 1) -> bytes:
    """A WAV file of 16 bits, the samples on every channel."""
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        whole = _in_16_bits(samples)
        file.writeframes(np.repeat(whole, channels).tobytes())
    return data.getvalue()


def _in_16_bits(samples: Samples) -> npt.NDArray[np.int16]:
    found: npt.NDArray[np.int16] = np.clip(np.round(samples * 32768), -32768, 32767).astype("<i2")
    return found


def as_read(samples: Samples) -> Samples:
    """The samples as a file of 16 bits keeps them."""
    found: Samples = (_in_16_bits(samples) / 32768).astype(np.float32)
    return found


def post_sound(
    served: Served, file: bytes | None, *, task: str = "transcriptions", name: str = "a.wav", **fields: str
) -> httpx2.Response:
    """Send a form to one of the routes."""
    [answer] = post_sounds(served, [(file, fields)], task=task, name=name)
    return answer


def post_sounds(
    served: Served,
    forms: Sequence[tuple[bytes | None, dict[str, str]]],
    *,
    task: str = "transcriptions",
    name: str = "a.wav",
) -> list[httpx2.Response]:
    """Send forms at once, so that they share batches."""

    async def ask() -> list[httpx2.Response]:
        import asyncio

        return await asyncio.gather(
            *(
                served.client.post(
                    f"/v1/audio/{task}",
                    data=fields if "adapter_id" in fields else {"model": "base", **fields},
                    files={"file": (name, file)} if file is not None else {"nothing": ("", b"")},
                )
                for file, fields in forms
            )
        )

    return served.portal.call(ask)
