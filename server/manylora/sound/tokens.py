"""What a model of speech is told by special tokens, and what it says by them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["SECONDS_PER_TIMESTAMP", "Sound", "SpeechForm", "SpeechInfo", "SpeechTokens"]

SECONDS_PER_TIMESTAMP: Final = 0.02


@dataclass(frozen=True, slots=True)
class SpeechTokens:
    """What the special tokens of a Whisper mean.

    `begin` begins every transcript; `no_timestamps` asks for none, and from `first_timestamp` on each token is a
    time, a fiftieth of a second after the one before. `suppressed` never come, `suppressed_first` not first in a
    text. A first time is at most number `max_first_timestamp`. A prompt stands behind `before`, a model without one
    takes none. `languages` by code, `transcribe` and `translate` are those of multilingual models. Tokens below `end`
    are text.
    """

    begin: int
    end: int
    no_timestamps: int
    first_timestamp: int
    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()
    max_first_timestamp: int | None = None
    before: int | None = None
    languages: Mapping[str, int] = field(default_factory=dict, hash=False)
    transcribe: int | None = None
    translate: int | None = None


@dataclass(frozen=True, slots=True)
class SpeechInfo:
    """What callers of a model of speech need to know: its tokens, and of the windows that it hears `window_s`, their
    length, `num_mels`, the bands of their spectrograms, and `num_positions` that each becomes.
    """

    tokens: SpeechTokens
    window_s: float
    num_mels: int
    num_positions: int


@dataclass(frozen=True, slots=True)
class SpeechForm:
    """What a transcript looks like, token by token.

    It begins with one token out of each of `first`, the likeliest. With `has_timestamps` its text is between times.
    """

    tokens: SpeechTokens
    first: tuple[tuple[int, ...], ...] = ()
    has_timestamps: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Sound:
    """A window of sound as a model hears it: float32 [mels, frames], which becomes `num_positions` positions."""

    spectrogram: npt.NDArray[np.float32]
    num_positions: int
