"""Sound as a stranger's file has it: read, resampled, cut into windows and turned into a spectrogram."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
from transformers import WhisperFeatureExtractor

from manylora.errors import InvalidAudio
from manylora.sound.reading import RATE, Samples, read
from manylora.sound.spectrogram import spectrogram
from manylora.sound.windows import windows

from .tiny import sound, wav


def file_of(samples: Samples, kind: str, rate: int = RATE, subtype: str | None = None) -> io.BytesIO:
    data = io.BytesIO()
    soundfile.write(data, samples, rate, format=kind, subtype=subtype)
    data.seek(0)
    return data


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

    found = read(file_of(np.stack([tone, tone], axis=1), kind, rate))

    assert abs(len(found) - RATE) <= RATE * 0.08  # MP3 pads its ends
    middle = found[RATE // 4 : RATE // 2]
    peak = np.fft.rfftfreq(len(middle), 1 / RATE)[np.abs(np.fft.rfft(middle)).argmax()]
    assert abs(peak - 440) < 5
    assert abs(np.abs(middle).max() - 0.4) < 0.05


def test_samples_beyond_full_scale_are_cut_there() -> None:
    loud = np.array([0.0, 3.0, -7.0, 0.5] * 100, dtype=np.float32)

    found = read(file_of(loud, "WAV", subtype="FLOAT"))

    np.testing.assert_array_equal(found, np.clip(loud, -1, 1))


def test_what_is_no_sound_is_refused_in_words() -> None:
    good = wav(sound(0))
    flac = file_of(sound(0), "FLAC").getvalue()
    hostile = {
        "cannot be read as sound": [b"no sound at all", b"\0" * 4096, b"RIFF", good[:20], flac[:30]],
        "holds no samples": [wav(sound(0)[:0]), good[:44]],
        "8 channels": [wav(sound(0), channels=8)],
        "samples a second": [wav(sound(0), rate=100), wav(sound(0), rate=999_999)],
        "not finite": [file_of(np.array([0, np.nan], dtype=np.float32), "WAV", subtype="FLOAT").getvalue()],
    }
    for words, files in hostile.items():
        for data in files:
            with pytest.raises(InvalidAudio, match=words) as caught:
                read(io.BytesIO(data))
            assert caught.value.param == "file"


def test_a_file_that_was_cut_off_is_read_as_far_as_it_goes() -> None:
    whole = wav(sound(0))

    assert 0 < len(read(io.BytesIO(whole[: len(whole) // 2]))) < len(sound(0))


def test_silence_that_unpacks_to_hours_is_refused_before_it_is_all_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "long.flac"
    with soundfile.SoundFile(path, "w", 8000, 1, format="FLAC") as file:
        for _ in range(31):
            file.write(np.zeros(8000 * 60, dtype=np.int16))
    assert path.stat().st_size < 300_000

    with pytest.raises(InvalidAudio, match="longer than 1800 seconds"):
        read(path)


def test_windows_are_cut_where_it_is_quiet_and_lose_nothing() -> None:
    samples = (0.5 * np.sin(2 * np.pi * 300 * np.arange(7 * RATE) / RATE)).astype(np.float32)
    for quiet_s in (1.7, 3.2, 4.9):
        samples[int((quiet_s - 0.15) * RATE) : int((quiet_s + 0.15) * RATE)] *= 0.01

    found = windows(samples, 2.0)

    np.testing.assert_array_equal(np.concatenate([each.samples for each in found]), samples)
    assert all(each.seconds <= 2.0 for each in found)
    for cut, quiet in zip([each.start_s for each in found[1:]], (1.7, 3.2, 4.9), strict=False):
        assert abs(cut - quiet) < 0.15
    assert len(found) >= 4
    assert [each.start_s for each in windows(samples[:100], 2.0)] == [0.0]
