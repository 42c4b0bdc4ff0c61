"""A stranger's file of sound becomes samples: mono, float32, 16,000 a second, within bounds on time and memory.

Files are read with libsndfile (WAV, FLAC, Ogg with Vorbis or Opus, MP3, AIFF and others) block by block, and resampled
as they are read, so that neither a header nor a file that unpacks to a thousand times its size decides how much is
done.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from manylora.errors import InvalidAudio
from manylora.packages import install_command

__all__ = ["RATE", "Samples", "missing_packages", "read"]

Samples = npt.NDArray[np.float32]
RATE: Final = 16_000
MAX_AUDIO_SECONDS: Final = 1800
MAX_CHANNELS: Final = 2
MIN_RATE: Final = 4_000
MAX_RATE: Final = 192_000
_BLOCK: Final = 2**17  # frames
_PACKAGES: Final = ("soundfile", "soxr")


def missing_packages() -> str | None:
    """What a server of a speech model lacks, and the command that installs it; None where all is there."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if not missing:
        return None
    return f"Models of speech need {' and '.join(missing)}. Install them: {install_command(*missing)}"


def read(source: Path | IO[bytes], *, max_seconds: float = MAX_AUDIO_SECONDS) -> Samples:
    """The samples [n] of a file, n at least 1. Raises InvalidAudio."""
    import soundfile

    try:
        with soundfile.SoundFile(source) as file:
            _check(file)
            return _samples(file, max_seconds)
    except soundfile.LibsndfileError as error:
        raise InvalidAudio(
            f"'file' cannot be read as sound: {str(error.error_string).rstrip('. ')}. Send WAV, FLAC, Ogg or MP3.",
            param="file",
        ) from None


def _check(file: Any) -> None:
    """Raises InvalidAudio for what no speech is recorded as."""
    if file.channels > MAX_CHANNELS:
        raise InvalidAudio(
            f"'file' has {file.channels} channels; at most {MAX_CHANNELS} are mixed into one. Send one channel.",
            param="file",
        )
    if not MIN_RATE <= file.samplerate <= MAX_RATE:
        raise InvalidAudio(
            f"'file' has {file.samplerate} samples a second; speech has {MIN_RATE} to {MAX_RATE}. Resample it.",
            param="file",
        )


def _samples(file: Any, max_seconds: float) -> Samples:
    import soxr

    most, num_frames = int(max_seconds * file.samplerate), 0
    resampler = None
    if file.samplerate != RATE:
        resampler = soxr.ResampleStream(file.samplerate, RATE, 1, dtype="float32")
    pieces: list[Samples] = []
    while True:
        block = file.read(_BLOCK, dtype="float32", always_2d=True)
        num_frames += len(block)
        if num_frames > most:
            raise InvalidAudio(
                f"'file' is longer than {max_seconds:g} seconds, the most that is transcribed at once. Split it.",
                param="file",
            )
        if not np.isfinite(block).all():
            raise InvalidAudio("'file' has samples that are not finite numbers. Save it anew.", param="file")
        mono = block.mean(axis=1) if block.shape[1] > 1 else block[:, 0]
        is_last = len(block) < _BLOCK
        pieces.append(mono if resampler is None else resampler.resample_chunk(mono, last=is_last))
        if is_last:
            break
    found = np.concatenate(pieces).astype(np.float32, copy=False)
    if not num_frames or not len(found):
        raise InvalidAudio("'file' holds no samples. Send a file with sound in it.", param="file")
    # What floats of a file may be beyond full scale is cut, as a converter to sound would.
    return np.clip(found, -1.0, 1.0)
