"""The routes of speech: forms, answers, long sound, streams, refusals, quotas and what is counted."""

import io
import json
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai import AsyncOpenAI

from manylora.models.offered import modules_of
from manylora.sound.reading import RATE
from manylora.sound.windows import windows
from tests.encoders.tiny import Served, make_encoder, serve

from .test_sound import file_of
from .tiny import (
    END,
    LANGUAGES,
    as_read,
    generated,
    make_speech_adapter,
    make_whisper,
    oracle,
    post_sound,
    post_sounds,
    sound,
    wav,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_whisper(tmp_path_factory.mktemp("routes") / "base")


@pytest.fixture(scope="module")
def served(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(base, tmp_path_factory.mktemp("data")) as one:
        yield one


def long_sound(seconds: float = 4.3) -> Any:
    return as_read(sound(4, seconds))


def test_long_sound_is_written_down_window_by_window(base: Path, served: Served) -> None:
    samples = long_sound()
    heard = [each for _, each in windows([samples], 1.0)]
    assert len(heard) >= 5
    answer = post_sound(served, wav(samples), language="en", response_format="verbose_json").json()
    model = oracle(base)
    expected = [[token for token in generated(model, window, has_times=True) if token < END] for window in heard]
    assert [token for each in answer["segments"] for token in each["tokens"]] == [*chain(*expected)]
    assert answer["duration"] == pytest.approx(4.3)
    assert answer["usage"] == {"type": "duration", "seconds": 5}
    assert answer["text"] == "".join(served.parts.engine.codec.decode(ids) for ids in expected).strip()
    ends = [0.0]
    for each in answer["segments"]:
        assert ends[-1] - 0.001 <= each["start"] <= each["end"] <= 4.31
        ends.append(each["end"])
        assert each["avg_logprob"] < 0
        assert each["compression_ratio"] > 0


def test_every_format_tells_the_same(served: Served) -> None:
    file = wav(long_sound(1.8))
    formats = ("json", "text", "verbose_json", "srt", "vtt")
    answers = dict(
        zip(
            formats,
            post_sounds(served, [(file, {"language": "de", "response_format": f}) for f in formats]),
            strict=True,
        )
    )
    assert all(each.status_code == 200 for each in answers.values())
    kinds = {name: each.headers["content-type"] for name, each in answers.items()}
    assert kinds["json"] == kinds["verbose_json"] == "application/json"
    assert {kinds[name] for name in ("text", "srt", "vtt")} == {"text/plain; charset=utf-8"}
    assert answers["text"].text == answers["json"].json()["text"] + "\n"
    segments = answers["verbose_json"].json()["segments"]
    assert answers["verbose_json"].json()["language"] == "de"
    srt, vtt = answers["srt"].text, answers["vtt"].text
    assert srt.startswith("1\n00:00:0")
    assert vtt.startswith("WEBVTT\n\n00:00:0")
    assert srt.count(" --> ") == vtt.count(" --> ") == len(segments) > 1
    assert all(each["text"].strip() in srt for each in segments)


def test_a_stream_has_the_text_of_all_windows_in_their_order(served: Served) -> None:
    file = wav(long_sound())
    whole = post_sound(served, file, language="zh").json()
    streamed = post_sound(served, file, language="zh", stream="true")
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line.removeprefix("data: ")) for line in streamed.text.splitlines() if line]
    assert {each["type"] for each in events[:-1]} == {"transcript.text.delta"}
    assert events[-1] == {"type": "transcript.text.done", "text": whole["text"], "usage": whole["usage"]}
    assert "".join(each["delta"] for each in events[:-1]).strip() == whole["text"]


def test_a_prompt_and_the_task_change_what_is_written(served: Served) -> None:
    file = wav(sound(1))
    plain = post_sound(served, file, language="en").json()["text"]
    prompted = post_sound(served, file, language="en", prompt="The quick brown fox").json()["text"]
    translated = post_sound(served, file, task="translations")
    assert translated.status_code == 200, translated.text
    assert len({plain, prompted, translated.json()["text"]}) == 3
    assert post_sound(served, file, task="translations", language="en").json()["error"]["param"] == "language"


def refused() -> dict[str, tuple[bytes | None, dict[str, str], str | None, str]]:
    """By name: file, fields, the field at fault and the code."""
    good = wav(sound(0))
    return {
        "no file": (None, {}, "nothing", "unsupported_field"),
        "empty": (b"", {}, "file", "invalid_audio"),
        "not audio": (b"%PDF-1.7 and so on" * 100, {}, "file", "invalid_audio"),
        "cut": (good[:30], {}, "file", "invalid_audio"),
        "no samples": (wav(sound(0)[:0]), {}, "file", "invalid_audio"),
        "eight channels": (wav(sound(0), channels=8), {}, "file", "invalid_audio"),
        "rate": (wav(sound(0), rate=1), {}, "file", "invalid_audio"),
        "unknown field": (good, {"best_of": "3"}, "best_of", "unsupported_field"),
        "words": (
            good,
            {"timestamp_granularities[]": "word", "response_format": "verbose_json"},
            "timestamp_granularities[]",
            "invalid_request",
        ),
        "times without form": (
            good,
            {"timestamp_granularities[]": "segment"},
            "timestamp_granularities[]",
            "invalid_request",
        ),
        "format": (good, {"response_format": "docx"}, "response_format", "invalid_request"),
        "temperature": (good, {"temperature": "warm"}, "temperature", "invalid_request"),
        "hot": (good, {"temperature": "1.5"}, "temperature", "invalid_request"),
        "not a number": (good, {"temperature": "nan"}, "temperature", "invalid_request"),
        "stream": (good, {"stream": "perhaps"}, "stream", "invalid_request"),
        "streamed subtitles": (good, {"stream": "true", "response_format": "srt"}, "stream", "invalid_request"),
        "language": (good, {"language": "tlh"}, "language", "invalid_request"),
        "special": (good, {"prompt": "<|startoftranscript|>"}, "prompt", "invalid_request"),
        "long prompt": (good, {"prompt": "a" * 5000}, "prompt", "invalid_request"),
        "extras": (good, {"chunking_strategy": "auto"}, "chunking_strategy", "unsupported_field"),
    }


def test_what_cannot_be_written_down_is_a_clear_400(served: Served) -> None:
    cases = refused()
    answers = post_sounds(served, [(file, fields) for file, fields, _, _ in cases.values()])
    for (name, (_, _, param, code)), answer in zip(cases.items(), answers, strict=True):
        assert answer.status_code == 400, (name, answer.text)
        error = answer.json()["error"]
        assert (error["param"], error["code"]) == (param, code), (name, error)
        assert len(error["message"]) < 400


def test_more_windows_than_are_queued_and_larger_bodies_are_refused(served: Served, tmp_path: Path) -> None:
    most = served.parts.engine.max_choices
    answer = post_sound(served, file_of(np.zeros((most + 2) * RATE, np.float32), "FLAC"))
    assert answer.status_code == 400
    assert f"at most {most} are queued" in answer.json()["error"]["message"]
    with serve(make_whisper(tmp_path / "base"), tmp_path / "data", max_body="64KiB", max_body_memory="128KiB") as small:
        assert post_sound(small, wav(sound(0, 3.0))).status_code == 413
        assert post_sound(small, wav(sound(0, 1.0))).status_code == 200
        # Small files that are large once they are decoded count as that, as long as they are held and no longer.
        silence = {seconds: file_of(np.zeros(seconds * RATE, np.float32), "FLAC") for seconds in (6, 12)}
        assert all(len(each) < 2**13 for each in silence.values())
        for seconds, status in ((6, 200), (12, 413), (6, 200), (6, 200)):
            answer = post_sound(small, silence[seconds])
            assert answer.status_code == status, answer.text
        assert "raise the server's max_body_memory" in post_sound(small, silence[12]).json()["error"]["message"]


def test_sound_is_counted_by_the_second(served: Served) -> None:
    before = served.get("/v1/usage").json()
    answer = post_sound(served, wav(sound(0, 2.5)), language="en")
    assert answer.status_code == 200
    after = served.get("/v1/usage").json()
    assert _prompt_tokens(after) - _prompt_tokens(before) >= 125
    metrics = served.get("/metrics").text
    line = next(line for line in metrics.splitlines() if line.startswith("manylora_sound_seconds_total{"))
    assert float(line.rpartition(" ")[2]) >= 2.5


@pytest.mark.parametrize("task", ["transcriptions", "translations"])
def test_speech_is_held_to_the_quota(served: Served, task: str) -> None:
    with served.nothing_left():
        assert post_sound(served, wav(sound(0)), task=task).json()["error"]["code"] == "quota_exceeded"
    assert post_sound(served, wav(sound(0)), task=task).status_code == 200


def _prompt_tokens(usage: dict[str, Any]) -> int:
    return sum(int(line["prompt_tokens"]) for line in usage["data"])


def test_openais_client_is_unchanged(served: Served) -> None:
    file = wav(sound(3))

    async def ask() -> list[Any]:
        client = AsyncOpenAI(base_url="http://127.0.0.1/v1", api_key="none", http_client=served.client)
        audio = client.audio
        plain = await audio.transcriptions.create(model="base", file=("a.wav", file), language="en")
        verbose = await audio.transcriptions.create(
            model="base",
            file=("a.wav", file),
            language="en",
            response_format="verbose_json",
            timestamp_granularities=["segment"],
            temperature=0,
        )
        text = await audio.transcriptions.create(
            model="base", file=io.BytesIO(file), language="en", response_format="text", prompt=""
        )
        stream = await audio.transcriptions.create(model="base", file=("a.wav", file), language="en", stream=True)
        events = [event async for event in stream]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the client's own, of this method
            translated = await audio.translations.create(model="base", file=("a.wav", file), response_format="srt")
        return [plain, verbose, text, events, translated]

    plain, verbose, text, events, translated = served.portal.call(ask)
    assert plain.text == events[-1].text == text.strip()
    assert verbose.segments[0].start >= 0
    assert verbose.language == "en"
    assert plain.usage.seconds == 1
    assert "-->" in translated


def test_other_routes_and_other_models_say_whom_to_ask(served: Served, tmp_path: Path) -> None:
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/embeddings", {"input": "hi"}),
        ("/v1/classify", {"input": "hi"}),
    ):
        error = served.post(path, model="base", **body).json()["error"]
        assert error["code"] == "wrong_model_type"
        assert "/v1/audio/transcriptions" in error["message"]
    with serve(make_encoder("bert", tmp_path / "bert"), tmp_path / "data") as encoder:
        error = post_sound(encoder, wav(sound(0))).json()["error"]
    assert error["code"] == "wrong_model_type"


def test_a_model_of_english_alone_takes_no_other_language(tmp_path: Path) -> None:
    base = make_whisper(tmp_path / "base", is_multilingual=False)
    with serve(base, tmp_path / "data") as english:
        answer = post_sound(english, wav(sound(0)), response_format="verbose_json").json()
        tokens = generated(oracle(base), as_read(sound(0)), language=None, has_times=True)
        assert [t for s in answer["segments"] for t in s["tokens"]] == [t for t in tokens if t < END]
        assert answer["language"] == "en"
        assert post_sound(english, wav(sound(0)), language=LANGUAGES[1]).json()["error"]["param"] == "language"
        translated = post_sound(english, wav(sound(0)), task="translations")
        assert translated.json()["error"]["code"] == "wrong_model_type"


def test_adapters_for_other_tasks_are_refused_and_modules_are_told_without_weights(
    base: Path, served: Served, tmp_path: Path
) -> None:
    folder = make_speech_adapter(base, tmp_path / "adapter", "usual")
    assert set(modules_of(str(base))) >= {
        "model.encoder.layers.0.self_attn.q_proj",
        "model.decoder.layers.1.encoder_attn.v_proj",
        "proj_out",
    }
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"task_type": "SEQ_2_SEQ_LM"}))
    assert served.upload(folder, "fits").status_code == 201
    path.write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    said = served.upload(folder, "other")
    assert said.status_code == 422
    assert said.json()["error"]["problems"][0]["where"].endswith("task_type")


def test_convolutions_are_no_targets(base: Path, served: Served, tmp_path: Path) -> None:
    folder = make_speech_adapter(base, tmp_path / "adapter", "convolution")
    said = served.upload(folder, "convolution")
    assert said.status_code == 422
    assert "conv1" in said.text


def test_a_mix_that_is_materialised_is_an_adapter_of_speech(base: Path, served: Served, tmp_path: Path) -> None:
    """With files that PEFT reads."""
    for seed, name in enumerate(("first", "second")):
        assert served.upload(make_speech_adapter(base, tmp_path / name, "usual", seed=seed), name).status_code == 201
    mix = [{"name": "first", "weight": 1.0}, {"name": "second", "weight": 0.5}]
    said = served.post("/v1/adapters", name="merged", mix=mix, materialise="dare_linear", density=1)
    assert said.status_code == 201, said.text
    stored = served.parts.catalog.local_folder(served.parts.catalog.directory.resolve("public", "merged"))
    answer = post_sound(served, wav(sound(1)), model="merged", language="en", response_format="verbose_json").json()
    found = [token for segment in answer["segments"] for token in segment["tokens"]]
    mixed, bare = (generated(oracle(base, folder), as_read(sound(1)), has_times=True) for folder in (stored, None))
    assert found == [token for token in mixed if token < END]
    assert mixed != bare


def test_an_adapter_is_named_as_lorax_does(base: Path, served: Served, tmp_path: Path) -> None:
    assert served.upload(make_speech_adapter(base, tmp_path / "adapter", "usual"), "named").status_code == 201
    by_model, by_id = post_sounds(
        served, [(wav(sound(0)), {"model": "named"}), (wav(sound(0)), {"adapter_id": "named"})]
    )
    assert by_id.status_code == 200, by_id.text
    assert by_model.json()["text"] == by_id.json()["text"]
