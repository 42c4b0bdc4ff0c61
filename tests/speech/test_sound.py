"""Sound as a stranger's file has it: read, resampled, cut into windows and turned into a spectrogram."""

import ctypes
import io
import random
import tracemalloc

import numpy as np
import pytest
import soundfile
from transformers import WhisperFeatureExtractor

from manylora.errors import InvalidAudio
from manylora.sound.reading import RATE, Samples, read
from manylora.sound.spectrogram import spectrogram
from manylora.sound.windows import windows

from .tiny import sound, wav


def file_of(samples: Samples, kind: str, rate: int = RATE, subtype: str | None = None) -> bytes:
    data = io.BytesIO()
    soundfile.write(data, samples, rate, format=kind, subtype=subtype)
    return data.getvalue()


def whole(data: bytes) -> Samples:
    return np.concatenate([*read(data)])


@pytest.mark.parametrize(("seconds", "num_mels"), [(30.0, 80), (7.3, 80), (0.01, 128)])
def test_the_spectrogram_is_that_of_transformers(seconds: float, num_mels: int) -> None:
    samples = sound(3, seconds)
    theirs = WhisperFeatureExtractor(feature_size=num_mels)(samples, sampling_rate=RATE, return_tensors="np")

    np.testing.assert_allclose(spectrogram(samples, num_mels, 30.0), theirs.input_features[0], atol=2e-5)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3", "AIFF"])
@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_files_of_all_kinds_and_rates_are_the_same_sound(kind: str, rate: int) -> None:
    at = np.arange(rate) / rate
    tone = (0.4 * np.sin(2 * np.pi * 440 * at)).astype(np.float32)

    found = whole(file_of(np.stack([tone, tone], axis=1), kind, rate))

    assert abs(len(found) - RATE) <= RATE * 0.08  # MP3 pads its ends
    middle = found[RATE // 4 : RATE // 2]
    peak = np.fft.rfftfreq(len(middle), 1 / RATE)[np.abs(np.fft.rfft(middle)).argmax()]
    assert abs(peak - 440) < 5
    assert abs(np.abs(middle).max() - 0.4) < 0.05


def test_samples_beyond_full_scale_are_cut_there() -> None:
    loud = np.array([0.0, 3.0, -7.0, 0.5] * 100, dtype=np.float32)

    found = whole(file_of(loud, "WAV", subtype="FLOAT"))

    np.testing.assert_array_equal(found, np.clip(loud, -1, 1))


def test_what_is_no_sound_is_refused_in_words() -> None:
    good = wav(sound(0))
    flac = file_of(sound(0), "FLAC")
    hostile = {
        "cannot be read as sound": [b"no sound at all", b"\0" * 4096, b"RIFF", good[:20], flac[:30]],
        "holds no samples": [wav(sound(0)[:0]), good[:44]],
        "8 channels": [wav(sound(0), channels=8)],
        "samples a second": [wav(sound(0), rate=100), wav(sound(0), rate=999_999)],
        "not finite": [file_of(np.array([0, np.nan], dtype=np.float32), "WAV", subtype="FLOAT")],
    }
    for words, files in hostile.items():
        for data in files:
            with pytest.raises(InvalidAudio, match=words) as caught:
                whole(data)
            assert caught.value.param == "file"


def test_a_file_that_was_cut_off_is_read_as_far_as_it_goes() -> None:
    data = wav(sound(0))

    assert 0 < len(whole(data[: len(data) // 2])) < len(sound(0))


@pytest.mark.parametrize("kind", ["AU", "W64", "RF64", "SVX", "VOC", "AVR", "HTK", "IRCAM", "MAT4", "NIST"])
def test_kinds_of_files_that_nobody_documents_are_not_opened(kind: str) -> None:
    with pytest.raises(InvalidAudio, match="Send WAV, FLAC, Ogg, MP3 or AIFF"):
        whole(file_of(sound(0), kind))


@pytest.mark.parametrize("kind", ["MP3", "FLAC"])
def test_tags_before_the_sound_are_no_part_of_it(kind: str) -> None:
    data = file_of(sound(0), kind)
    tags = b"ID3\x04\0\0\0\0\x01\x02" + bytes(130) + b"ID3\x04\0\x10\0\0\0\0" + bytes(10)

    np.testing.assert_array_equal(whole(tags + data), whole(data))
    for broken in (tags, tags[:7], tags * 5 + data, tags + b"caff" + data, b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + data):
        with pytest.raises(InvalidAudio, match="begins as no file"):
            whole(broken)


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Some bytes changed, most of them near the beginning, others lost or there twice."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        at = draw.randrange(min(len(found), draw.choice([64, 200, len(found)])))
        ways = {
            "one": lambda at: found.__setitem__(at, draw.randrange(256)),
            "size": lambda at: found.__setitem__(slice(at, at + 4), draw.choice([b"\xff" * 4, b"\0\0\0\x80"])),
            "lost": lambda at: found.__delitem__(slice(at, at + draw.randint(1, 9))),
            "twice": lambda at: found.__setitem__(slice(at, at), found[: draw.randint(1, 60)]),
        }
        ways[draw.choice(list(ways))](at)
    return bytes(found)


def test_damaged_files_are_read_or_refused_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """MP3 aside: its decoder within libsndfile has a voice of its own."""
    draw, kinds = random.Random(0), (("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", None), ("OGG", None), ("AIFF", None))
    files = [file_of(sound(0, 0.2), kind, subtype=subtype) for kind, subtype in kinds]
    num_read = 0
    for _ in range(600):
        try:
            num_read += len(whole(damaged(draw.choice(files), draw))) > 0
        except InvalidAudio:
            continue
    # Sizes that lead before the beginning of the file.
    for at in range(12, 60):
        for size in (b"\xff" * 4, b"\x80\0\0\0", b"\0\0\0\x80"):
            for data in files:
                try:
                    whole(data[:at] + size + data[at + 4 :])
                except InvalidAudio:
                    continue

    assert 50 < num_read < 550
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr() == ("", "")


def test_silence_that_unpacks_to_hours_is_refused_before_it_is_all_unpacked_and_little_of_it_is_held() -> None:
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 8000, 1, format="FLAC") as long:
        for _ in range(31):
            long.write(np.zeros(8000 * 60, dtype=np.int16))
    data = file.getvalue()
    assert len(data) < 300_000

    tracemalloc.start()
    try:
        with pytest.raises(InvalidAudio, match="longer than 1800 seconds"):
            for _ in windows(read(data), 30.0):
                pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * 2**20  # of 115 MB


@pytest.mark.parametrize("size", [700, 16_000, 10**6])
def test_windows_are_cut_where_it_is_quiet_and_lose_nothing(size: int) -> None:
    """However the sound comes."""
    samples = (0.5 * np.sin(2 * np.pi * 300 * np.arange(7 * RATE) / RATE)).astype(np.float32)
    for quiet_s in (1.7, 3.2, 4.9):
        samples[int((quiet_s - 0.15) * RATE) : int((quiet_s + 0.15) * RATE)] *= 0.01

    found = [*windows(np.split(samples, range(size, len(samples), size)), 2.0)]

    np.testing.assert_array_equal(np.concatenate([each for _, each in found]), samples)
    assert all(window.seconds == len(each) / RATE <= 2.0 for window, each in found)
    for (cut, _), quiet in zip(found[1:], (1.7, 3.2, 4.9), strict=False):
        assert abs(cut.start_s - quiet) < 0.15
    assert len(found) >= 4
    assert [each.start_s for each, _ in windows([samples[:100]], 2.0)] == [0.0]
