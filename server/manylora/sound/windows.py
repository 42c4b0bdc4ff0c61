"""Long sound becomes windows that a speech model hears one by one, cut where it is quietest."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from manylora.sound.reading import RATE, Samples

__all__ = ["Window", "windows"]

_SEARCHED_S: Final = 5.0  # of a window's end, in which the cut is looked for
_QUIET_S: Final = 0.1  # how long a stretch is whose loudness is compared


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of the sound: where it starts, in seconds from the beginning, and how long it is."""

    start_s: float
    seconds: float


def windows(blocks: Iterable[Samples], window_s: float) -> Iterator[tuple[Window, Samples]]:
    """The sound in windows of at most `window_s` seconds, one after the other without gap or overlap.

    Each with its samples [n], not padded. No more of the sound is held than the next one is cut from.
    """
    most = int(window_s * RATE)
    start, held = 0, np.zeros(0, np.float32)
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) > most:
            end = _quietest(held[:most])
            yield Window(start / RATE, end / RATE), held[:end]
            start, held = start + end, held[end:]
    yield Window(start / RATE, len(held) / RATE), held


def _quietest(samples: Samples) -> int:
    """The middle of the quietest stretch near the end, the last of several."""
    size = int(_QUIET_S * RATE)
    searched = min(int(_SEARCHED_S * RATE), len(samples) // 2)
    first = len(samples) - searched
    count = searched // size
    power = np.square(samples[first : first + count * size].astype(np.float64)).reshape(count, size).mean(axis=1)
    best = count - 1 - int(np.argmin(power[::-1]))
    return first + best * size + size // 2
