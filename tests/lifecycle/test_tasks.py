"""`train --task token|question|embed|asr`: what training scored is what a server answers."""

import hashlib
import json
import random
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manylora.errors import InvalidRequest
from manylora.lifecycle.data.data import read_dataset
from manylora.lifecycle.evaluate.command import run_evaluation
from manylora.lifecycle.evaluate.config import EvaluateRequest
from manylora.lifecycle.parameters import InvalidParameter, TrainTask
from manylora.lifecycle.progress import Progress
from manylora.lifecycle.tasks.interface import Source
from manylora.lifecycle.tasks.questions import Questions, words_of
from manylora.lifecycle.tasks.speech import distance
from manylora.lifecycle.tasks.tags import Tagged, Tagging, spans
from manylora.lifecycle.train.choose_rank import choose_rank
from manylora.lifecycle.train.config import ChooseConfig, LoraShape, Schedule, TrainConfig
from manylora.lifecycle.train.train import TrainResult, train
from tests.encoders.tiny import make_encoder, serve
from tests.lifecycle.helpers import write_rows
from tests.speech import tiny as speech

NAMES = ("fox", "dog", "lazy", "quick")
CROSS = ("encoder_attn.q_proj", "encoder_attn.v_proj")
PLAIN = ("the", "brown", "jumps", "over", "and", "then", "it", "sat", "down")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder("bert", tmp_path_factory.mktemp("base") / "bert")


def tag_rows(count: int, seed: int) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        words = [chance.choice(PLAIN) for _ in range(chance.randint(2, 5))] + [chance.choice(NAMES)]
        chance.shuffle(words)
        rows.append({"tokens": words, "tags": ["B-name" if word in NAMES else "O" for word in words]})
    return rows


def question_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts with one name in them, which is what is asked for."""
    return [
        {
            "question": "it",
            "context": " ".join(row["tokens"]),
            "answer": next(word for word in row["tokens"] if word in NAMES),
        }
        for row in tag_rows(count, seed)
    ]


def pair_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """What belongs to an anchor is told by a name, whatever else stands there."""
    chance = random.Random(seed)

    def text(name: str) -> str:
        words = [name, *chance.sample(PLAIN, chance.randint(1, 3))]
        chance.shuffle(words)
        return " ".join(words)

    rows = []
    for number in range(count):
        name, other = NAMES[number % 2], NAMES[1 - number % 2]
        rows.append({"anchor": f"{name} {name}", "positive": text(name), "negative": text(other)})
    return rows


def trained(
    base: Path, folder: Path, task: TrainTask, rows: Sequence[Sequence[dict[str, Any]]], lr: float
) -> TrainResult:
    told: list[Progress] = []
    config = TrainConfig(
        data=write_rows(folder / "train.jsonl", rows[0]),
        test_data=write_rows(folder / "test.jsonl", rows[1]),
        out=folder / "adapter",
        base=str(base),
        task=task,
        lora=LoraShape(rank=8),
        schedule=Schedule(epochs=8, batch_size=12, lr=lr),
        dtype="float32",
        device="cpu",
        threads=1,
    )
    done = train(config, listen=told.append)
    assert any("`test_data`: " in each.message for each in told if each.stage == "scores")
    return done


def test_words_get_the_labels_that_training_scored(base: Path, tmp_path: Path) -> None:
    rows = tag_rows(160, 1), tag_rows(30, 2)
    done = trained(base, tmp_path, "token", rows, 1e-2)
    scores = done.report["scores"]
    assert scores["span_f1"] > 0.8
    assert "Held-out F1 of spans" in (done.out / "README.md").read_text()
    with serve(base, tmp_path / "data") as served:
        said = served.upload(done.out, "names")
        assert said.status_code == 201, said.text
        assert said.json()["report"]["head"]["labels"] == ["B-name", "O"]
        texts = [" ".join(row["tokens"]) for row in rows[1]]
        found = served.post("/classify", model="names", inputs=texts).json()
    right = 0
    encoded = Tagging().encode(read_dataset(tmp_path / "test.jsonl"), Source(str(base)), 60)
    for row, example, entries in zip(rows[1], encoded, found, strict=True):
        assert isinstance(example, Tagged)
        named = [entries[place]["entity"] for place in example.firsts]
        right += sum(a == b for a, b in zip(named, row["tags"], strict=True))
    assert right / sum(len(row["tags"]) for row in rows[1]) == pytest.approx(scores["accuracy"])


def test_questions_get_the_answers_that_training_scored(base: Path, tmp_path: Path) -> None:
    rows = question_rows(160, 1), question_rows(30, 2)
    done = trained(base, tmp_path, "question", rows, 1e-2)
    scores = done.report["scores"]
    assert scores["exact_match"] > 0.8
    with serve(base, tmp_path / "data") as served:
        assert served.upload(done.out, "asked").status_code == 201
        contexts = [row["context"] for row in rows[1]]
        found = served.post("/v1/question-answering", model="asked", question="it", context=contexts).json()["data"]
    assert [each["answers"][0]["answer"] for each in found] == scores["answers"]


def test_texts_are_ranked_as_training_scored(base: Path, tmp_path: Path) -> None:
    rows = pair_rows(120, 1), pair_rows(20, 2)
    done = trained(base, tmp_path, "embed", rows, 5e-3)
    scores, before = done.report["scores"], done.report["base_scores"]
    assert scores["num_examples"] == 2, "anchors"
    assert scores["auc"] > max(0.95, before["auc"]), "of a base that was drawn by chance"
    assert f"; base {before['auc']:.3f}" in (done.out / "README.md").read_text()
    with serve(base, tmp_path / "data") as served:
        assert served.upload(done.out, "taste").status_code == 201
        aucs = []
        for anchor in ("fox fox", "dog dog"):
            own = [row for row in rows[1] if row["anchor"] == anchor]
            wanted = {row["positive"] for row in own}
            texts = sorted(wanted | {row["negative"] for row in own})
            told = served.post("/v1/rerank", model="taste", query=anchor, documents=texts).json()["results"]
            order = [texts[each["index"]] in wanted for each in told]
            pairs = [(a, b) for a, good in enumerate(order) if good for b, other in enumerate(order) if not other]
            aucs.append(sum(a < b for a, b in pairs) / len(pairs))
    assert np.mean(aucs) == pytest.approx(scores["auc"])


@pytest.mark.parametrize("targets", [(*CROSS, "decoder.layers.0.fc1", "decoder.layers.1.fc2"), ()])
def test_speech_is_written_down_as_training_scored(targets: tuple[str, ...], tmp_path: Path) -> None:
    """With the encoder fixed, whose states are computed once, and with matrices in it."""
    base = speech.make_whisper(tmp_path / "base", is_multilingual=False)
    rows = [{"audio": f"{number}.wav", "text": ("fox", "dog")[number % 2]} for number in range(8)]
    for number in range(8):
        write_tone(tmp_path / f"{number}.wav", 300 + 900 * (number % 2) + number)
    config = TrainConfig(
        data=write_rows(tmp_path / "train.jsonl", rows[:6]),
        test_data=write_rows(tmp_path / "test.jsonl", rows[6:]),
        out=tmp_path / "adapter",
        base=str(base),
        task="asr",
        lora=LoraShape(rank=8, targets=targets),
        schedule=Schedule(epochs=40, batch_size=4, lr=2e-2),
        dtype="float32",
        device="cpu",
        threads=1,
    )
    done = train(config)
    assert done.report["train_loss"][-1][1] < done.report["train_loss"][0][1]
    with serve(base, tmp_path / "data") as served:
        assert served.upload(done.out, "tones").status_code == 201
        said = [speech.post_sound(served, (tmp_path / row["audio"]).read_bytes(), model="tones") for row in rows[6:]]
    assert [each.json()["text"].strip() for each in said] == done.report["scores"]["answers"] == ["fox", "dog"]


def test_files_of_sound_are_what_a_checkpoint_and_a_digest_are_of(tmp_path: Path) -> None:
    base = speech.make_whisper(tmp_path / "base", is_multilingual=False)
    for name in ("a.wav", "b.wav"):
        write_tone(tmp_path / name, 500)
    rows = [{"audio": name, "text": "fox"} for name in ("b.wav", "a.wav")]
    config = TrainConfig(
        data=write_rows(tmp_path / "train.jsonl", rows),
        out=tmp_path / "adapter",
        base=str(base),
        task="asr",
        lora=LoraShape(rank=2, targets=CROSS),
        schedule=Schedule(epochs=2, batch_size=1),
        device="cpu",
        threads=1,
    )
    assert not train(config, should_stop=lambda: True).finished
    before = (tmp_path / "a.wav").read_bytes()
    write_tone(tmp_path / "a.wav", 900)
    with pytest.raises(InvalidRequest, match="other data"):
        train(config, resume=True)
    (tmp_path / "a.wav").write_bytes(before)
    done = train(config, resume=True)

    whole = b"".join((tmp_path / name).read_bytes() for name in ("train.jsonl", "b.wav", "a.wav"))
    assert done.finished
    assert done.report["data_sha256"] == {"data": hashlib.sha256(whole).hexdigest(), "eval": None}


def write_tone(path: Path, hertz: float) -> None:
    samples = (np.sin(np.arange(8000) * hertz * 2 * np.pi / 16000) * 9000).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(samples.tobytes())


@pytest.mark.parametrize(
    ("task", "row", "said"),
    [
        ("token", {"tokens": ["a", "b"], "tags": ["O"]}, "of one length"),
        ("token", {"tokens": ["a b"], "tags": ["O"]}, "one word"),
        ("question", {"question": "x", "context": "a fox", "answer": "dog"}, "does not stand in context"),
        ("question", {"question": "x", "context": "a fox", "answers": {"text": ["fox"]}}, "lists of one length"),
        ("embed", {"anchor": "fox", "positive": "dog", "negative": " "}, "negative is empty"),
        ("embed", {"text": "fox", "label": "b"}, "takes rows of anchor and positive"),
        ("generate", {"anchor": "fox", "positive": "dog"}, "Give `task` embed"),
        ("asr", {"audio": "gone.wav", "text": "fox"}, "gone.wav cannot be read"),
        ("asr", {"audio": "train.jsonl", "text": "fox"}, "begins as no file"),
    ],
)
def test_rows_that_are_not_the_tasks_are_refused(
    task: TrainTask, row: dict[str, Any], said: str, tmp_path: Path
) -> None:
    base = speech.make_whisper(tmp_path / "base", is_multilingual=False) if task == "asr" else tmp_path
    path = write_rows(tmp_path / "train.jsonl", [row, {**row, "label": "c"} if "label" in row else row])
    with pytest.raises(InvalidRequest, match=said):
        train(TrainConfig(data=path, out=tmp_path / "out", base=str(base), task=task))


def test_a_model_of_many_languages_is_told_which_one_is_spoken(tmp_path: Path) -> None:
    base = speech.make_whisper(tmp_path / "base")
    write_tone(tmp_path / "a.wav", 500)
    path = write_rows(tmp_path / "train.jsonl", [{"audio": "a.wav", "text": "fox"}])
    with pytest.raises(InvalidParameter, match="must have the `language`"):
        train(TrainConfig(data=path, out=tmp_path / "out", base=str(base), task="asr"))


def test_a_word_is_tagged_at_its_first_token_also_where_spaces_belong_to_tokens(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"tokens": ["the", "unknownword", "fox"], "tags": ["O", "O", "B-x"]}])
    for kind in ("bert", "roberta"):
        base = make_encoder(kind, tmp_path / kind)
        (found,) = Tagging().encode(read_dataset(path), Source(str(base)), 60)
        assert sum(found.is_answer) == 3
        (cut,) = Tagging().encode(read_dataset(path), Source(str(base)), 4)
        assert 0 < sum(cut.is_answer) < 3
        assert cut.num_cut > 0


def test_an_answer_that_is_cut_off_is_refused_with_its_row(base: Path, tmp_path: Path) -> None:
    row = {"question": "it", "context": "the brown dog sat down and then the fox", "answer": "fox"}
    dataset = read_dataset(write_rows(tmp_path / "rows.jsonl", [row]))
    with pytest.raises(InvalidParameter, match="row 1's answer is cut off"):
        Questions().encode(dataset, Source(str(base)), 12)


def test_runs_of_words_are_found_with_marks_and_without() -> None:
    assert list(spans(["B-a", "I-a", "B-a", "O", "I-b"])) == [("a", 0, 2), ("a", 2, 3), ("b", 4, 5)]
    assert list(spans(["a", "a", "O", "b"])) == [("a", 0, 2), ("b", 3, 4)]


def test_errors_are_counted_as_edits() -> None:
    assert distance(words_of("Take 5 mg, twice."), words_of("take 5 mg once a day")) == 3
    assert distance("", "ab") == 2
    assert words_of("我爱 Beijing!") == ["我", "爱", "beijing"]


def test_what_training_scored_an_evaluation_finds_again_beside_the_base(base: Path, tmp_path: Path) -> None:
    rows = pair_rows(60, 1), pair_rows(20, 2)
    done = trained(base, tmp_path, "embed", rows, 5e-3)
    request = EvaluateRequest(
        data=tmp_path / "test.jsonl", adapters=(str(done.out),), with_base=True, task="embed", model=str(base),
        out=tmp_path / "scores", card=True, device="cpu", dtype="float32",
    )  # fmt: skip
    report, promotion = run_evaluation(request)
    assert promotion is None
    assert json.loads((tmp_path / "scores" / "evaluate.json").read_text()) == report
    for name, values in (("base", done.report["base_scores"]), ("adapter", done.report["scores"])):
        for metric in ("ndcg_10", "mrr", "auc"):
            entry = report["contenders"][name][metric]
            assert entry["value"] == pytest.approx(values[metric], abs=1e-6)
            assert entry["low"] <= entry["value"] <= entry["high"]
    gain = report["contenders"]["adapter"]["against_reference"]["auc"]
    assert gain["gain"] == pytest.approx(done.report["scores"]["auc"] - done.report["base_scores"]["auc"])
    assert "| auc | " in (done.out / "README.md").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"server": "http://127.0.0.1:1"}, "`server` has no place in `task` classify"),
        ({"with_base": True}, "the bare base has no head"),
        ({"task": "embed"}, "takes rows of anchor and positive"),
    ],
)
def test_an_evaluation_refuses_what_its_task_has_no_place_for(
    more: dict[str, Any], said: str, base: Path, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "the fox", "label": label} for label in ("a", "b")])
    given = {"data": path, "task": "classify", "model": str(base), "with_base": True, **more}
    with pytest.raises(InvalidRequest, match=said):
        run_evaluation(EvaluateRequest(**given))


def test_ranks_of_a_task_are_chosen_by_its_loss(base: Path, tmp_path: Path) -> None:
    training = TrainConfig(
        data=write_rows(tmp_path / "rows.jsonl", tag_rows(40, 1)), out=tmp_path / "out", base=str(base), task="token",
        schedule=Schedule(epochs=2, batch_size=8, lr=1e-2), device="cpu", dtype="float32",
    )  # fmt: skip
    report, _ = choose_rank(ChooseConfig(training, ranks=(1, 4), folds=2))
    assert report is not None
    assert report["score"] == "held-out loss in nats per word"
    assert all(each["mean"] < report["base_loss"] for each in report["candidates"])
