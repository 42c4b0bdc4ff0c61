"""Transcripts of a tiny Whisper against transformers and PEFT, token by token, alone and in one batch."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from manylora.engine.interface import SamplingParams, Sound, SpeechForm
from manylora.errors import InvalidSettings
from manylora.models.backends import choose
from manylora.models.encoder_loading import encoder_backend, load_encoder
from manylora.models.speech_loading import load_speech, speech_backend
from manylora.settings import load_settings
from manylora.sound.spectrogram import spectrogram
from tests.encoders.tiny import Served, serve

from .tiny import (
    BEGIN,
    CONTEXT,
    END,
    FIRST_TIME,
    IDS,
    LANGUAGES,
    NO_TIMES,
    NUM_MELS,
    POSITIONS,
    TUNED,
    as_read,
    generated,
    make_speech_adapter,
    make_whisper,
    oracle,
    post_sounds,
    sound,
    wav,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_whisper(tmp_path_factory.mktemp("speech") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("adapters")
    return {
        name: make_speech_adapter(base, home / name, name, seed=i)
        for i, name in enumerate(TUNED)
        if name != "convolution"
    }


@pytest.fixture(scope="module")
def served(base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(base, tmp_path_factory.mktemp("data"), max_num_seqs=32) as one:
        for name, folder in adapters.items():
            said = one.upload(folder, name)
            assert said.status_code == 201, said.text
        yield one


def written(served: Served, prompt: list[int], form: SpeechForm, seed: int) -> list[int]:
    """The engine's tokens of one window, without the end's."""
    heard = Sound(spectrogram(sound(seed), NUM_MELS, 1.0), POSITIONS)
    params = SamplingParams(max_tokens=CONTEXT - len(prompt), temperature=0.0, speech=form)

    async def ask() -> list[int]:
        generation = served.parts.engine.generate("one", prompt, params, sound=heard)
        return [token async for delta in generation for token in delta.token_ids]

    return [token for token in served.portal.call(ask) if token != form.tokens.end]


@pytest.mark.parametrize("has_times", [False, True])
def test_the_base_writes_token_for_token_what_transformers_does(has_times: bool, base: Path, served: Served) -> None:
    """With the language said, found out, and behind a prompt."""
    model = oracle(base)
    info = served.parts.engine.model.speech
    assert info is not None
    last = () if has_times else (NO_TIMES,)
    languages = tuple(IDS[f"<|{code}|>"] for code in LANGUAGES)
    behind = (IDS["<|transcribe|>"], *last)
    for seed in range(4):
        prompt = [BEGIN, IDS["<|de|>"], *behind]
        known = generated(model, sound(seed), language="de", has_times=has_times)
        assert len(set(known)) > 4
        assert written(served, prompt, SpeechForm(info.tokens, has_timestamps=has_times), seed) == known

        before = [IDS["<|startofprev|>"], 100, 200, 90]
        prompted = generated(model, sound(seed), language="de", has_times=has_times, prompt=tuple(before))
        assert prompted != known
        assert written(served, before + prompt, SpeechForm(info.tokens, has_timestamps=has_times), seed) == prompted

        found_out = SpeechForm(info.tokens, (languages, *((each,) for each in behind)), has_timestamps=has_times)
        mine = written(served, [BEGIN], found_out, seed)
        config = model.generation_config
        assert mine[:1] == model.detect_language(_features(seed), generation_config=config).tolist()
        heard = next(code for code in LANGUAGES if IDS[f"<|{code}|>"] == mine[0])
        assert mine[1:] == [*behind, *generated(model, sound(seed), language=heard, has_times=has_times)]
    if has_times:
        assert any(token >= FIRST_TIME for token in known)


def _features(seed: int) -> Any:
    return torch.from_numpy(spectrogram(sound(seed), NUM_MELS, 1.0))[None]


def test_requests_of_all_adapters_in_one_batch_get_what_each_gets_alone_and_from_peft(
    base: Path, adapters: dict[str, Path], served: Served
) -> None:
    names = [None, *adapters]
    forms = [
        (
            wav(sound(seed)),
            {"model": name or "base", "language": "en", "response_format": "verbose_json"},
        )
        for seed in range(2)
        for name in names
    ]
    together = post_sounds(served, forms)
    assert [each.status_code for each in together] == [200] * 16, together[0].text
    for number, (answer, form) in enumerate(zip(together, forms, strict=True)):
        [alone] = post_sounds(served, [form])
        assert _told(alone.json()) == _told(answer.json())
        name, seed = names[number % 8], number // 8
        model = oracle(base, None if name is None else adapters[name])
        tokens = generated(model, as_read(sound(seed)), has_times=True)
        segments = answer.json()["segments"]
        mine = [token for each in segments for token in each["tokens"]]
        assert mine == [token for token in tokens if token < END], name
    texts = {json.dumps(_told(each.json())) for each in together}
    assert len(texts) == 16


def _told(answer: dict[str, Any]) -> Any:
    return answer["text"], answer["segments"], answer["language"], answer["duration"]


def test_a_mix_and_versions_are_named_as_for_text(served: Served) -> None:
    file = wav(sound(1))
    plain, versioned, unknown = post_sounds(
        served,
        [(file, {"model": "usual"}), (file, {"model": "usual@1"}), (file, {"model": "nobody"})],
    )
    assert plain.json()["text"] == versioned.json()["text"]
    assert plain.json()["manylora"]["adapter"]["name"] == "usual"
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "adapter_not_found"


def test_a_chance_answer_depends_on_nobody_else(served: Served) -> None:
    """With a temperature an answer is drawn, and its language is still the likeliest."""
    file = wav(sound(2))
    cold, warm = post_sounds(
        served,
        [
            (file, {"response_format": "verbose_json"}),
            (file, {"response_format": "verbose_json", "temperature": "1"}),
        ],
    )
    assert cold.json()["language"] == warm.json()["language"]
    assert cold.json()["text"] != warm.json()["text"]


def test_what_is_run_without_sound_hears_nothing_of_anybody(served: Served) -> None:
    """As a warm-up does: neither what an earlier request left in its slot nor what no request has written."""
    info = served.parts.engine.model.speech
    assert info is not None
    form = SpeechForm(info.tokens, has_timestamps=True)
    params = SamplingParams(max_tokens=20, temperature=0.0, speech=form)

    async def ask() -> list[int]:
        generation = served.parts.engine.generate("none", [BEGIN], params)
        return [token async for delta in generation for token in delta.token_ids]

    found = []
    for seed in range(3):
        post_sounds(served, [(wav(sound(seed)), {})])
        found.append(served.portal.call(ask))
    assert found[0] == found[1] == found[2]


def test_windows_wait_for_their_turn_and_slots_are_used_again(base: Path, served: Served, tmp_path: Path) -> None:
    forms = [(wav(sound(seed)), {"language": "en"}) for seed in range(6)]
    wanted = [each.json()["text"] for each in post_sounds(served, forms)]
    with serve(base, tmp_path / "data", max_num_seqs=2) as small:
        found = [each.json()["text"] for each in post_sounds(small, forms)]
    assert found == wanted
    assert len(set(wanted)) == 6


@pytest.mark.parametrize("setting", ["quantization", "kv_cache_dtype"])
def test_rounding_is_refused_and_not_ignored(setting: str, tmp_path: Path) -> None:
    for profile in ("default", "small"):
        asked = load_settings(device="cpu", profile=profile, **{setting: "int8"})
        with pytest.raises(InvalidSettings, match=f"{setting}: models of speech"):
            load_speech(asked, tmp_path)
        with pytest.raises(InvalidSettings, match=f"{setting}: encoders"):
            load_encoder(asked, tmp_path)


def test_what_a_profile_says_of_rounding_is_for_the_models_that_are_rounded() -> None:
    small = load_settings(device="cpu", profile="small")
    for backend in (speech_backend(small), encoder_backend(small)):
        assert (backend.format.name, backend.kv_dtype) == ("none", None)
    assert (choose(small).format.name, choose(small).kv_dtype) == ("int4", torch.int8)


def test_what_a_profile_says_of_rounding_is_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    small = load_settings(device="cuda", profile="small", kernels="torch")
    assert (choose(small).format.name, choose(small).kv_dtype) == ("none", None)
    for setting in ("quantization", "kv_cache_dtype"):
        with pytest.raises(InvalidSettings, match=f"{setting}: int8 is for CPUs"):
            choose(load_settings(device="cuda", profile="small", kernels="torch", **{setting: "int8"}))
