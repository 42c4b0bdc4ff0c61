"""A stranger's file of sound becomes samples: mono, float32, 16,000 a second, within bounds on time and memory.

Files are read with libsndfile block by block and resampled as they are read, so that neither a header nor a file that
unpacks to a thousand times its size decides how much is done or held. It knows many kinds of files more than are taken:
only what begins as WAV, FLAC, Ogg (Vorbis, Opus), MP3 or AIFF does comes to it.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from io import SEEK_CUR, SEEK_END, SEEK_SET, BytesIO
from typing import Any, Final

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
MAX_TAGS: Final = 8  # of ID3, before the sound
_BLOCK: Final = 2**17  # frames
_PACKAGES: Final = ("soundfile", "soxr")
_TAKEN: Final = "WAV, FLAC, Ogg, MP3 or AIFF"
_LAST: Final = 2**62  # how far a damaged header may send its reader


def missing_packages() -> str | None:
    """What a server of a speech model lacks, and the command that installs it; None where all is there."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if not missing:
        return None
    return f"Models of speech need {' and '.join(missing)}. Install them: {install_command(*missing)}"


def read(data: bytes, *, max_seconds: float = MAX_AUDIO_SECONDS) -> Iterator[Samples]:
    """The samples of a file, block after block, [n] each and at least 1 together. Raises InvalidAudio."""
    import soundfile

    start = _behind_tags(data)
    if not _is_taken(data[start : start + 12]):
        raise InvalidAudio(
            f"'file' cannot be read as sound: it begins as no file of WAV, FLAC, Ogg, MP3 or AIFF does. Send {_TAKEN}.",
            param="file",
        )
    try:
        with soundfile.SoundFile(_Source(data[start:])) as file:
            _check(file)
            yield from _samples(file, max_seconds)
    except soundfile.LibsndfileError as error:
        raise InvalidAudio(
            f"'file' cannot be read as sound: {str(error.error_string).rstrip('. ')}. Send {_TAKEN}.", param="file"
        ) from None


class _Source(BytesIO):
    """A file whose damaged headers lead nowhere: what they ask for never fails, which the library would print."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._size = len(data)

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        base = {SEEK_CUR: self.tell(), SEEK_END: self._size}.get(whence, 0)
        return super().seek(min(max(base + offset, 0), _LAST))


def _behind_tags(data: bytes) -> int:
    """Where the sound begins behind ID3 tags, which stand before MP3 and some FLAC."""
    start = 0
    for _ in range(MAX_TAGS):
        if data[start : start + 3] != b"ID3" or len(data) < start + 10:
            break
        flags, sizes = data[start + 5], data[start + 6 : start + 10]
        size = sum((each & 0x7F) << shift for each, shift in zip(sizes, (21, 14, 7, 0), strict=True))
        start += 10 + size + (10 if flags & 0x10 else 0)
    return start


def _is_taken(begin: bytes) -> bool:
    """Whether the first 12 bytes are those of a kind of file that is taken."""
    if begin[:4] in (b"fLaC", b"OggS"):
        return True
    if begin[:4] in (b"RIFF", b"RIFX"):
        return begin[8:] == b"WAVE"
    if begin[:4] == b"FORM":
        return begin[8:] in (b"AIFF", b"AIFC")
    # A frame of MPEG: eleven bits that are set, then a version and a layer, one of whose four numbers means nothing.
    head = int.from_bytes(begin[:2], "big")
    return head >> 5 == 0x7FF and head >> 3 & 3 != 1 and head >> 1 & 3 != 0


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


def _samples(file: Any, max_seconds: float) -> Iterator[Samples]:
    import soxr

    most, num_frames, has_any, is_last = int(max_seconds * file.samplerate), 0, False, False
    resampler = None
    if file.samplerate != RATE:
        resampler = soxr.ResampleStream(file.samplerate, RATE, 1, dtype="float32")
    while not is_last:
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
        found = mono if resampler is None else resampler.resample_chunk(mono, last=is_last)
        if num_frames and len(found):
            has_any = True
            # What floats of a file may be beyond full scale is cut, as a converter to sound would.
            yield np.clip(found.astype(np.float32, copy=False), -1.0, 1.0)
    if not has_any:
        raise InvalidAudio("'file' holds no samples. Send a file with sound in it.", param="file")
