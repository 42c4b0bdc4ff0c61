"""Long sound becomes windows that a speech model hears one by one, cut where it is quietest."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from manylora.sound.reading import RATE, Samples

__all__ = ["Window", "windows"]

_SEARCHED_S: Final = 5.0  # of a window's end, in which the cut is looked for
_QUIET_S: Final = 0.1  # how long a stretch is whose loudness is compared


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of the sound: where it starts, in seconds from the beginning, and its samples [n], not padded."""

    start_s: float
    samples: Samples

    @property
    def seconds(self) -> float:
        return len(self.samples) / RATE


def windows(samples: Samples, window_s: float) -> list[Window]:
    """The sound in windows of at most `window_s` seconds, one after the other without gap or overlap."""
    most = int(window_s * RATE)
    found: list[Window] = []
    start = 0
    while len(samples) - start > most:
        end = start + _quietest(samples[start : start + most])
        found.append(Window(start / RATE, samples[start:end]))
        start = end
    found.append(Window(start / RATE, samples[start:]))
    return found


def _quietest(samples: Samples) -> int:
    """The middle of the quietest stretch near the end, the last of several."""
    size = int(_QUIET_S * RATE)
    searched = min(int(_SEARCHED_S * RATE), len(samples) // 2)
    first = len(samples) - searched
    count = searched // size
    power = np.square(samples[first : first + count * size].astype(np.float64)).reshape(count, size).mean(axis=1)
    best = count - 1 - int(np.argmin(power[::-1]))
    return first + best * size + size // 2
