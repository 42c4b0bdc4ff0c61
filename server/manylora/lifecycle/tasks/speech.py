"""Speech: what is said in files of sound, by a Whisper and an adapter on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch.nn import functional

from manylora.errors import InvalidAudio
from manylora.lifecycle.base import base_name, memory_faults
from manylora.lifecycle.data.data import Dataset, Example
from manylora.lifecycle.data.encoding import Encoded
from manylora.lifecycle.parameters import InvalidParameter
from manylora.lifecycle.tasks.encoders import found_of
from manylora.lifecycle.tasks.interface import Measured, Metric, Numbers, Source, TaskBase
from manylora.lifecycle.tasks.questions import words_of
from manylora.lifecycle.train.objectives import Summed
from manylora.models import checkpoint
from manylora.models.backends import select_device, select_dtype
from manylora.models.loading import resolve_model
from manylora.models.speech_loading import is_speech, tokens_of, whisper_of
from manylora.sound.reading import RATE, Samples, missing_packages, read
from manylora.sound.spectrogram import FRAMES_PER_SECOND, spectrogram
from manylora.sound.tokens import SpeechTokens

__all__ = ["Heard", "Speech", "distance"]

MAX_KEPT: Final = 512  # files whose encoder's states are kept from one epoch to the next, 2 MB each of the smallest
_NOTHING: Final = -100
_HOP: Final = 2  # frames of a spectrogram that become one position


@dataclass(frozen=True, slots=True)
class Heard(Encoded):
    """A file of sound. `ids` are the transcript's tokens, the first of them given; `language` may be empty."""

    samples: Samples | None = None
    language: str = ""


class Speech:
    """What is said. Implements `interface.Task`."""

    unit: Final = "token"
    lower: Final = frozenset({"wer", "cer"})

    def labels(self, _dataset: Dataset) -> tuple[str, ...]:
        return ()

    def load(self, source: Source, _labels: tuple[str, ...]) -> TaskBase:
        folder = _folder(source)
        place = select_device(source.device)
        read_config: Any = checkpoint.read_speech_config(folder)
        stored = read_config.dtype if isinstance(read_config.dtype, torch.dtype) else torch.float32
        with memory_faults("Choose a smaller base."):
            dtype = select_dtype(source.dtype, place, stored)
            loaded: Any = whisper_of(folder, read_config, dtype).to(place)
        loaded.requires_grad_(False)
        context = int(read_config.max_target_positions)
        name = source.name or base_name(source.model, folder)
        return TaskBase(loaded, checkpoint.load_tokenizer(folder), name, context, stored, folder)

    def encode(self, dataset: Dataset, source: Source, max_length: int) -> list[Encoded]:
        """Files lie where the data does, unless their paths are whole ones. One is at most a window long."""
        folder = _folder(source)
        if missing := missing_packages():
            raise InvalidParameter(f"`task` asr: {missing}")
        config: Any = checkpoint.read_speech_config(folder)
        reader = _Reader(
            checkpoint.load_tokenizer(folder),
            tokens_of(folder, config),
            dataset,
            int(config.max_source_positions) * _HOP / FRAMES_PER_SECOND,
            min(max_length, int(config.max_target_positions)),
        )
        return [reader.heard(example) for example in dataset.examples]

    def objective(self, model: Any, base: TaskBase) -> "Transcripts":
        return Transcripts(model, base)

    def measured(self, model: Any, base: TaskBase, examples: Sequence[Encoded]) -> Measured:
        """Rates of errors in words and in characters, of all files together: greedy, without times."""
        said = found_of(model, examples, lambda some: _transcripts(model, base, some))
        pairs = [(words_of(each.example.answer), words_of(text)) for each, text in zip(examples, said, strict=True)]
        joined = [(list("".join(wanted)), list("".join(found))) for wanted, found in pairs]
        metrics: dict[str, Metric] = {
            name: _rate(np.array([(distance(wanted, found), len(wanted)) for wanted, found in each]))
            for name, each in (("wer", pairs), ("cer", joined))
        }
        return Measured(len(examples), metrics, {"answers": said})


def _rate(counts: Numbers) -> Metric:
    return lambda some: float(counts[some, 0].sum() / max(1, counts[some, 1].sum()))


def distance(wanted: Sequence[str], found: Sequence[str]) -> int:
    """How many must be put in, left out or replaced to make the one of the other."""
    row = list(range(len(found) + 1))
    for number, one in enumerate(wanted, start=1):
        before, row = row, [number]
        for place, other in enumerate(found, start=1):
            row.append(min(before[place] + 1, row[-1] + 1, before[place - 1] + (one != other)))
    return row[-1]


def _folder(source: Source) -> Path:
    folder = resolve_model(source.model)
    if source.model is None or not is_speech(folder):
        raise InvalidParameter("`task` asr takes a Whisper: give its folder as `base`, or whisper-tiny.en.")
    return folder


@dataclass(frozen=True, slots=True)
class _Reader:
    """Makes examples of rows of `dataset`: sound and text are at most `window_s` and `most` tokens long."""

    tokenizer: Any
    tokens: SpeechTokens
    dataset: Dataset
    window_s: float
    most: int

    def heard(self, example: Example) -> Heard:
        said = example.messages[1].content if len(example.messages) > 2 else ""
        first = self._first(example, said)
        text = self.tokenizer(f" {example.answer}", add_special_tokens=False)["input_ids"]
        ids = (*first, *text, self.tokens.end)
        if len(ids) > self.most:
            raise InvalidParameter(f"`data`: row {example.row}'s text has {len(ids)} tokens, more than {self.most}.")
        is_answer = tuple(place >= len(first) for place in range(len(ids)))
        return Heard(example, ids, is_answer, samples=self._samples(example), language=said)

    def _first(self, example: Example, language: str) -> tuple[int, ...]:
        """What stands before every transcript."""
        tokens = self.tokens
        if not tokens.languages:
            return tokens.begin, tokens.no_timestamps
        if language not in tokens.languages or tokens.transcribe is None:
            raise InvalidParameter(f"`data`: row {example.row} must have the `language` that is spoken, such as zh.")
        return tokens.begin, tokens.languages[language], tokens.transcribe, tokens.no_timestamps

    def _samples(self, example: Example) -> Samples:
        try:
            found = np.concatenate(list(read(self.dataset.file_of(example), max_seconds=self.window_s)))
        except InvalidAudio as error:
            raise InvalidParameter(f"`data`: row {example.row}: {error}") from error
        return found[: int(self.window_s * RATE)]


class Transcripts:
    """Implements `objectives.Objective`: mean negative log-likelihood of a transcript's token, in nats.

    Where nothing in the encoder is learnt, what it makes of a file is computed once.
    """

    def __init__(self, model: Any, base: TaskBase) -> None:
        self._model = model
        self._base = base
        encoder = base.model.model.encoder
        self._is_fixed = not any(parameter.requires_grad for parameter in encoder.parameters())
        self._kept: dict[int, torch.Tensor] = {}

    def weight(self, example: Encoded) -> int:
        return example.num_answer_tokens

    def summed(self, examples: Sequence[Encoded]) -> Summed:
        length = max(len(each) for each in examples) - 1
        ids = torch.full((len(examples), length), self._base.pad_id)
        wanted = torch.full((len(examples), length), _NOTHING)
        for row, each in enumerate(examples):
            ids[row, : len(each) - 1] = torch.tensor(each.ids[:-1])
            learnt = torch.tensor(each.is_answer[1:])
            wanted[row, : len(each) - 1] = torch.where(learnt, torch.tensor(each.ids[1:]), _NOTHING)
        ids, wanted = ids.to(self._base.device), wanted.to(self._base.device)
        found = self._model(encoder_outputs=(self._states(examples),), decoder_input_ids=ids)
        loss = functional.cross_entropy(found.logits.float().flatten(0, 1), wanted.flatten(), reduction="sum")
        return Summed(loss, sum(len(each) for each in examples))

    def _states(self, examples: Sequence[Encoded]) -> torch.Tensor:
        """What the encoder makes of the sounds: [files, positions, width]."""
        if not self._is_fixed:
            return self._encoded(examples)
        new = [each for each in examples if id(each) not in self._kept]
        fresh: dict[int, torch.Tensor] = {}
        if new:
            with torch.no_grad():
                fresh = dict(zip(map(id, new), self._encoded(new), strict=True))
        for number, states in fresh.items():
            if len(self._kept) < MAX_KEPT:
                self._kept[number] = states
        return torch.stack([self._kept[id(each)] if id(each) in self._kept else fresh[id(each)] for each in examples])

    def _encoded(self, examples: Sequence[Encoded]) -> torch.Tensor:
        states: torch.Tensor = self._base.model.model.encoder(_features(self._base, examples)).last_hidden_state
        return states


def _features(base: TaskBase, examples: Sequence[Encoded]) -> torch.Tensor:
    """Spectrograms [files, mels, frames]."""
    config = base.model.config
    window_s = config.max_source_positions * _HOP / FRAMES_PER_SECOND
    found = []
    for each in examples:
        assert isinstance(each, Heard), "the task encoded it"
        assert each.samples is not None, "the task encoded it"
        found.append(spectrogram(each.samples, config.num_mel_bins, window_s))
    return torch.from_numpy(np.stack(found)).to(base.device, base.model.dtype)


def _transcripts(model: Any, base: TaskBase, examples: Sequence[Encoded]) -> list[str]:
    """What is said in each file, greedy and without times."""
    heard = [each for each in examples if isinstance(each, Heard)]
    found = [""] * len(heard)
    for language in sorted({each.language for each in heard}):
        indices = [index for index, each in enumerate(heard) if each.language == language]
        more: dict[str, Any] = {"language": language, "task": "transcribe"} if language else {}
        features = _features(base, [heard[index] for index in indices])
        ids = model.generate(input_features=features, return_timestamps=False, do_sample=False, **more)
        for index, text in zip(indices, base.tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            found[index] = str(text).strip()
    return found
