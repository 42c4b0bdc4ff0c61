"""Answers that adapters find in texts, against PEFT and the pipeline of transformers' own question answering."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from manylora.api.questions import best_answers
from manylora.engine.interface import EncodedPair

from .test_classify import make_classifier
from .tiny import CONFIGS, Served, make_encoder, make_encoder_adapter, make_encoder_tokenizer, peft_model, serve

QUESTION = "who jumps"
CONTEXTS = ["the quick brown fox jumps over the lazy dog", "naïve café 🙂 我爱北京", "x"]
WIDE = {"max_position_embeddings": 130}
BARE = {"add_special_tokens": False}


def make_answerer(base: Path, folder: Path, kind: str) -> Path:
    """ModernBERT's head has another name, which PEFT does not save by itself."""
    return make_encoder_adapter(
        base,
        folder,
        model_class=AutoModelForQuestionAnswering,
        task="QUESTION_ANS",
        targets=r".*\.(Wqkv|Wi|Wo)" if kind == "modernbert" else "all-linear",
        exclude_modules=["qa_outputs"] if kind != "modernbert" else None,
        num_labels=2,
        modules_to_save=["head", "classifier"] if kind == "modernbert" else None,
        seed=5,
    )


def by_hand(base: Path, adapter: Path, context: str, max_len: int) -> list[dict[str, Any]]:
    """Every answer that there may be, the best first: all pairs of ends, one by one."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = peft_model(base, adapter, model_class=AutoModelForQuestionAnswering)
    has_types = getattr(model.config, "type_vocab_size", 1) > 1
    encoded = tokenizer(
        QUESTION, context, return_tensors="pt", return_offsets_mapping=True, return_token_type_ids=has_types
    )
    owners, offsets = encoded.sequence_ids(0), encoded.pop("offset_mapping")[0].tolist()
    with torch.inference_mode():
        found = model(**encoded)
    may = torch.tensor([place == 0 or owner == 1 for place, owner in enumerate(owners)])
    starts, ends = (
        torch.softmax(logits[0].double().masked_fill(~may, -torch.inf), -1).tolist()
        for logits in (found.start_logits, found.end_logits)
    )
    mine = [place for place, owner in enumerate(owners) if owner == 1]
    spans = [(starts[a] * ends[b], a, b) for a in mine for b in mine if 0 <= b - a < max_len]
    return [
        {"answer": context[offsets[a][0] : offsets[b][1]], "score": score, "start": offsets[a][0], "end": offsets[b][1]}
        for score, a, b in sorted(spans, key=lambda each: -each[0])
    ]


@pytest.mark.parametrize("kind", [*CONFIGS])
def test_answers_are_those_of_peft(kind: str, tmp_path: Path) -> None:
    base = make_encoder(kind, tmp_path / "base", **WIDE)
    adapter = make_answerer(base, tmp_path / "answers", kind)
    with serve(base, tmp_path / "data") as served:
        said = served.upload(adapter, "answers")
        assert said.status_code == 201, said.text
        body = {"model": "answers", "question": QUESTION, "context": CONTEXTS, "top_k": 3, "max_answer_len": 4}
        answers = served.together("/v1/question-answering", [body, body])
    for answer in answers:
        assert answer.status_code == 200, answer.text
        for context, entry in zip(CONTEXTS, answer.json()["data"], strict=True):
            wanted = by_hand(base, adapter, context, 4)[:3]
            assert len(entry["answers"]) == len(wanted)
            for found, best in zip(entry["answers"], wanted, strict=True):
                assert found["score"] == pytest.approx(best["score"], abs=1e-5)
                assert found["answer"] == context[found["start"] : found["end"]]
            assert entry["answers"][0] == {**wanted[0], "score": entry["answers"][0]["score"]}


def scored(count: int, *, first: int = 3, seed: int = 0) -> tuple[np.ndarray, EncodedPair, str]:
    """Random scores of a pair whose second text has `count` letters, each a token."""
    random = np.random.default_rng(seed)
    text = "abcdefghijklmnopqrstuvwxyz"[:count]
    pair = EncodedPair(
        tuple(range(first + count + 1)), first, range(first, first + count), tuple((i, i + 1) for i in range(count))
    )
    return random.standard_normal((first + count + 1, 2)).astype(np.float32), pair, text


@pytest.mark.parametrize(("top_k", "max_len"), [(1, 3), (5, 3), (100, 64)])
def test_the_best_spans_come_first(top_k: int, max_len: int) -> None:
    scores, pair, text = scored(9)
    shares = np.exp(scores[3:12].astype(np.float64)) / np.exp(scores[3:12].astype(np.float64)).sum(axis=0)
    every = sorted((-(shares[a, 0] * shares[b, 1]), a, b + 1) for a in range(9) for b in range(a, min(a + max_len, 9)))
    found = best_answers(scores, pair, text, top_k=top_k, max_len=max_len, may_be_none=False, has_first=False)
    assert [(each["start"], each["end"]) for each in found] == [(a, b) for _, a, b in every[:top_k]]
    np.testing.assert_allclose([each["score"] for each in found], [-score for score, _, _ in every[:top_k]])
    assert [each["answer"] for each in found] == [text[a:b] for _, a, b in every[:top_k]]


def test_that_there_is_none_may_be_the_answer() -> None:
    scores, pair, text = scored(4)
    scores[0] = 9.0
    asked: dict[str, Any] = {"top_k": 2, "max_len": 3, "has_first": True}
    found = best_answers(scores, pair, text, may_be_none=True, **asked)
    assert (found[0]["answer"], found[0]["start"], found[0]["end"]) == ("", 0, 0)
    assert found[1] == best_answers(scores, pair, text, may_be_none=False, **asked)[0]
    scores[0] = -9.0
    assert best_answers(scores, pair, text, may_be_none=True, **asked)[0]["answer"] != ""


@pytest.mark.parametrize("may_be_none", [True, False])
def test_a_text_without_tokens_has_no_answer(may_be_none: bool) -> None:
    scores, pair, _ = scored(0)
    found = best_answers(scores, pair, " ", top_k=3, max_len=5, may_be_none=may_be_none, has_first=True)
    assert [each["answer"] for each in found] == ([""] if may_be_none else [])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("questions")
    base = make_encoder("bert", folder / "base", **WIDE)
    tokenizer = make_encoder_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()  # for texts that have no tokens
    tokenizer.save_pretrained(base)
    answers = make_answerer(base, folder / "answers", "bert")
    with serve(base, folder / "data") as served:
        assert served.upload(answers, "answers").status_code == 201
        assert served.upload(make_classifier(base, folder / "mood", "three"), "mood").status_code == 201
        three = folder / "three"
        three.mkdir()
        (three / "adapter_config.json").write_text((answers / "adapter_config.json").read_text())
        tensors = load_file(answers / "adapter_model.safetensors")
        tensors["base_model.model.qa_outputs.weight"] = torch.ones(3, 48)
        tensors["base_model.model.qa_outputs.bias"] = torch.ones(3)
        save_file(tensors, three / "adapter_model.safetensors", metadata={"format": "pt"})
        refused = served.upload(three, "three")
        assert [each["code"] for each in refused.json()["error"]["problems"]] == ["head_shape"]
        yield served


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("answers", {"model": "mood", "question": "x", "context": "y"}, "model"),
        ("answers", {"model": "base", "question": "x", "context": "y"}, "model"),
        ("answers", {"model": "answers", "question": "x", "context": []}, "context"),
        ("answers", {"model": "answers", "question": "x", "context": ""}, "context"),
        ("answers", {"model": "answers", "question": "x", "context": "y", "top_k": 0}, "top_k"),
        (
            "question-answering",
            {"model": "answers", "question": "x", "context": "y", "max_answer_len": 65},
            "max_answer_len",
        ),
        ("answers", {"model": "answers", "question": "x", "context": "y " * 200}, "context"),
        ("answers", {"model": "answers", "question": "x", "context": ["y", " "], **BARE}, "context"),
        ("answers", {"model": "answers", "question": " ", "context": " ", **BARE}, "context"),
        ("score", {"model": "mood", "text_1": " ", "text_2": " ", **BARE}, "text_2"),
        ("classify", {"model": "answers", "input": "x"}, "model"),
        ("rerank", {"model": "answers", "query": "x", "documents": ["x"]}, "model"),
    ],
)
def test_what_cannot_be_answered_is_a_400(served: Served, path: str, body: dict[str, Any], param: str) -> None:
    answer = served.post({"answers": "/v1/question-answering"}.get(path, f"/v1/{path}"), **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_questions_are_held_to_the_quota(served: Served) -> None:
    body = {"model": "answers", "question": "x", "context": "y"}
    with served.nothing_left():
        assert served.post("/v1/question-answering", **body).json()["error"]["code"] == "quota_exceeded"
    assert served.post("/v1/question-answering", **body).status_code == 200


def test_a_text_without_tokens_has_no_answer_of_its_own(served: Served) -> None:
    for more, answers in (({}, []), ({"handle_impossible_answer": True}, [""])):
        body = {"model": "answers", "question": "x", "context": " ", **more}
        [entry] = served.post("/v1/question-answering", **body).json()["data"]
        assert [each["answer"] for each in entry["answers"]] == answers


def test_a_long_text_is_cut_at_its_end_where_the_body_says_so(served: Served) -> None:
    body = {"model": "answers", "question": "x", "context": "y " * 200, "truncate_prompt_tokens": -1}
    [entry] = served.post("/v1/question-answering", **body).json()["data"]
    assert entry["answers"][0]["end"] < 260
