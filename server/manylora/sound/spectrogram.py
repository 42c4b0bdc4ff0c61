"""The log-mel spectrogram that Whisper hears (Radford et al., 2022), in numpy."""

from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from manylora.sound.reading import RATE, Samples

__all__ = ["FRAMES_PER_SECOND", "mel_filters", "spectrogram"]

_FFT: Final = 400  # samples
_HOP: Final = 160
FRAMES_PER_SECOND: Final = RATE // _HOP
_FLOOR: Final = 1e-10
_RANGE: Final = 8.0  # powers of ten below the loudest, where quieter ones are cut off
_LINEAR_TO: Final = 1000.0  # Hz, up to which the scale of Slaney's toolbox is linear
_HZ_PER_MEL: Final = 200.0 / 3.0
_LOG_STEP: Final = np.log(6.4) / 27.0


def spectrogram(samples: Samples, num_mels: int, window_s: float) -> npt.NDArray[np.float32]:
    """float32 [num_mels, window_s * 100] of samples [n], padded with silence to the window; n is at most that."""
    size = int(window_s * RATE)
    whole = np.zeros(size + _FFT)
    middle = _FFT // 2
    whole[middle : middle + len(samples)] = samples
    whole[:middle] = whole[middle + 1 : 2 * middle + 1][::-1]  # mirrored at both ends
    whole[-middle:] = whole[-2 * middle - 1 : -middle - 1][::-1]
    frames = np.lib.stride_tricks.sliding_window_view(whole, _FFT)[::_HOP][: size // _HOP]
    hann = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(_FFT) / _FFT)
    power = np.square(np.abs(np.fft.rfft(frames * hann, axis=1)))
    log = np.log10(np.maximum(power @ mel_filters(num_mels), _FLOOR)).T
    found: npt.NDArray[np.float32] = ((np.maximum(log, log.max() - _RANGE) + 4.0) / 4.0).astype(np.float32)
    return found


@lru_cache(maxsize=4)
def mel_filters(num_mels: int) -> npt.NDArray[np.float64]:
    """Triangles on Slaney's mel scale, of equal area each, from 0 to 8,000 Hz: [frequencies, num_mels]."""
    edges = _hertz(np.linspace(0.0, _mels(RATE / 2.0), num_mels + 2))
    frequencies = np.linspace(0.0, RATE / 2.0, _FFT // 2 + 1)
    widths = np.diff(edges)
    slopes = edges[None, :] - frequencies[:, None]
    rising, falling = -slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]
    found: npt.NDArray[np.float64] = np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (edges[2:] - edges[:-2]))
    return found


def _mels(hertz: float) -> float:
    return _LINEAR_TO / _HZ_PER_MEL + float(np.log(hertz / _LINEAR_TO)) / float(_LOG_STEP)


def _hertz(mels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    border = _LINEAR_TO / _HZ_PER_MEL
    found: npt.NDArray[np.float64] = np.where(
        mels < border, mels * _HZ_PER_MEL, _LINEAR_TO * np.exp(_LOG_STEP * (mels - border))
    )
    return found
