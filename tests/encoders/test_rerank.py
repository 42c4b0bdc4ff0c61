"""Texts held against a text: by heads of pairs, against transformers and PEFT, and by the angle between embeddings."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, text
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from manylora.api import pairs
from manylora.catalog.labels import Label
from tests.tiny_models import make_tokenizer

from .test_classify import make_classifier
from .tiny import Served, make_encoder, make_encoder_adapter, make_encoder_tokenizer, peft_model, serve

QUERY = "what does the fox jump over"
DOCUMENTS = ["the lazy dog", "我爱北京天安门", "SELECT name FROM users;", "the quick brown fox", "x"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder("bert", tmp_path_factory.mktemp("rerank") / "base", type_vocab_size=2)


@pytest.fixture(scope="module")
def fits(base: Path) -> Path:
    """A head of one label."""
    return make_encoder_adapter(
        base,
        base.parent / "fits",
        model_class=AutoModelForSequenceClassification,
        task="SEQ_CLS",
        num_labels=1,
        seed=3,
    )


@pytest.fixture(scope="module")
def served(base: Path, fits: Path) -> Iterator[Served]:
    folders = {
        "fits": fits,
        "taste": make_encoder_adapter(base, base.parent / "taste"),
        "mood": make_classifier(base, base.parent / "mood", "three"),
        "tags": make_classifier(base, base.parent / "tags", "two", task="TOKEN_CLS"),
    }
    with serve(base, base.parent / "data") as served:
        for name, folder in folders.items():
            said = served.upload(folder, name)
            assert said.status_code == 201, said.text
        yield served


@torch.inference_mode()
def by_peft(base: Path, adapter: Path, query: str, documents: list[str]) -> np.ndarray:
    """What a model with PEFT's adapter gives each pair, token types among what it is told."""
    model = peft_model(base, adapter, model_class=AutoModelForSequenceClassification, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = []
    for document in documents:
        encoded = tokenizer(query, document, return_tensors="pt", return_token_type_ids=True)
        assert encoded["token_type_ids"].any()
        found.append(float(model(**encoded).logits[0, 0]))
    return np.array(found)


def sigmoid(scores: np.ndarray) -> np.ndarray:
    found: np.ndarray = 1 / (1 + np.exp(-scores))
    return found


def scores_of(served: Served, model: str) -> list[float]:
    answer = served.post("/v1/score", model=model, text_1=QUERY, text_2=DOCUMENTS)
    return [each["score"] for each in answer.json()["data"]]


def test_pairs_are_scored_as_by_peft_whatever_is_beside_them(served: Served, base: Path, fits: Path) -> None:
    bodies: list[dict[str, Any]] = [{"model": "fits", "text_1": QUERY, "text_2": DOCUMENTS}] * 2
    answers = served.together("/v1/score", [*bodies, {"model": "taste", "text_1": "a", "text_2": ["b", "c d e"]}])
    wanted = by_peft(base, fits, QUERY, DOCUMENTS)
    for answer in answers[:2]:
        found = answer.json()
        np.testing.assert_allclose([each["score"] for each in found["data"]], sigmoid(wanted), atol=1e-5)
        assert found["id"].startswith("score-")
        assert [each["index"] for each in found["data"]] == list(range(5))
        assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] > 0
    as_they_are = served.post("/v1/score", **bodies[0], use_activation=False).json()["data"]
    np.testing.assert_allclose([each["score"] for each in as_they_are], wanted, atol=1e-5)
    later = served.post("/v1/score", model="fits", queries=[QUERY] * 5, documents=DOCUMENTS).json()["data"]
    assert later == answers[0].json()["data"]


def test_without_a_head_a_score_is_the_cosine_of_embeddings(served: Served) -> None:
    for model in ("base", "taste"):
        texts = served.post("/v1/embeddings", model=model, input=[QUERY, *DOCUMENTS]).json()["data"]
        first, *seconds = [np.array(each["embedding"]) for each in texts]
        found = served.post("/v1/score", model=model, text_1=QUERY, text_2=DOCUMENTS).json()["data"]
        np.testing.assert_allclose([each["score"] for each in found], [first @ each for each in seconds], atol=1e-6)
        each_with_each = served.post("/v1/score", model=model, text_1=DOCUMENTS, text_2=DOCUMENTS).json()["data"]
        np.testing.assert_allclose([each["score"] for each in each_with_each], 1.0, atol=1e-6)


@pytest.mark.parametrize("model", ["fits", "taste"])
def test_the_best_come_first_in_every_dialect(served: Served, model: str) -> None:
    scores = scores_of(served, model)
    order = sorted(range(5), key=lambda i: -scores[i])
    body = {"model": model, "query": QUERY, "documents": DOCUMENTS}
    found = served.post("/v1/rerank", **body).json()
    assert [each["index"] for each in found["results"]] == order
    assert [each["relevance_score"] for each in found["results"]] == [scores[i] for i in order]
    assert [each["document"]["text"] for each in found["results"]] == [DOCUMENTS[i] for i in order]
    assert served.post("/rerank", **body).json()["results"] == found["results"]
    bare = [{"index": i, "relevance_score": scores[i]} for i in order]
    assert served.post("/v2/rerank", **body).json()["results"] == bare
    assert served.post("/v1/rerank", **body, return_documents=False).json()["results"] == bare
    assert served.post("/v2/rerank", **body, return_documents=True, top_n=2).json()["results"] == found["results"][:2]
    as_objects = {**body, "documents": [{"text": text} for text in DOCUMENTS]}
    assert served.post("/v1/rerank", **as_objects).json()["results"] == found["results"]
    tei = {"model": model, "query": QUERY, "texts": DOCUMENTS}
    assert served.post("/rerank", **tei).json() == [{"index": i, "score": scores[i]} for i in order]
    with_texts = served.post("/rerank", **tei, return_text=True).json()
    assert [each["text"] for each in with_texts] == [DOCUMENTS[i] for i in order]


def test_heads_of_before_a_version_said_which_are_found(base: Path, fits: Path, tmp_path: Path) -> None:
    """A data folder of before, whose registry and labels tell of a head by the modules in a report alone."""
    named = tmp_path / "named"
    named.mkdir()
    made = make_encoder_adapter(base, tmp_path / "made")
    config = json.loads((made / "adapter_config.json").read_text()) | {"base_model_name_or_path": "SEQ_CLS:x"}
    (named / "adapter_config.json").write_text(json.dumps(config))
    (named / "adapter_model.safetensors").write_bytes((made / "adapter_model.safetensors").read_bytes())
    data = tmp_path / "data"
    with serve(base, data) as before:
        for name, folder in (("fits", fits), ("named", named)):
            assert before.upload(folder, name).status_code == 201
        wanted = [scores_of(before, name) for name in ("fits", "named")]
    alembic = Config()
    alembic.set_main_option("script_location", "manylora.database:migrations")
    engine = create_engine(f"sqlite:///{data / 'registry.sqlite3'}")
    with engine.begin() as connection:
        alembic.attributes["connection"] = connection
        command.downgrade(alembic, "0020")
        connection.execute(text("UPDATE versions SET report = json_remove(report, '$.head')"))
    engine.dispose()
    for path in (data / "store" / "labels").iterdir():
        told = json.loads(path.read_text())
        head = told.pop("head")
        told["report"].pop("head", None)
        path.write_text(json.dumps(told))
        assert Label.model_validate_json(path.read_text()).head == head == ("SEQ_CLS" if told["name"] == "fits" else "")
    with serve(base, data) as after:
        assert [scores_of(after, name) for name in ("fits", "named")] == wanted


def test_a_decoder_reranks_too(tiny_llama_dir: Path, tmp_path: Path) -> None:
    head = make_encoder_adapter(
        tiny_llama_dir,
        tmp_path / "fits",
        model_class=AutoModelForSequenceClassification,
        task="SEQ_CLS",
        num_labels=1,
        seed=1,
    )
    with serve(tiny_llama_dir, tmp_path / "data", kv_cache_memory=2**24) as decoder:
        assert decoder.upload(head, "fits").status_code == 201
        scores, cosines = scores_of(decoder, "fits"), scores_of(decoder, "base")
    model = peft_model(tiny_llama_dir, head, model_class=AutoModelForSequenceClassification, num_labels=1)
    tokenizer = make_tokenizer()
    with torch.inference_mode():
        wanted = [float(model(torch.tensor([tokenizer(QUERY, each)["input_ids"]])).logits[0, 0]) for each in DOCUMENTS]
    np.testing.assert_allclose(scores, sigmoid(np.array(wanted)), atol=1e-5)
    assert all(-1 <= each <= 1.000001 for each in cosines)


def test_a_pair_that_is_too_long_is_a_400_or_cut_at_its_end(served: Served, base: Path, fits: Path) -> None:
    long = " ".join(["the lazy dog"] * 40)
    body = {"model": "fits", "text_1": QUERY, "text_2": long}
    answer = served.post("/v1/score", **body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    [found] = served.post("/v1/score", **body, truncate_prompt_tokens=-1, use_activation=False).json()["data"]
    model = peft_model(base, fits, model_class=AutoModelForSequenceClassification, num_labels=1)
    encoded = make_encoder_tokenizer()(
        QUERY, long, truncation="only_second", max_length=66, return_tensors="pt", return_token_type_ids=True
    )
    with torch.inference_mode():
        assert found["score"] == pytest.approx(float(model(**encoded).logits[0, 0]), abs=1e-5)
    no_room = served.post("/v1/score", model="fits", text_1=long, text_2="x", truncate_prompt_tokens=-1)
    assert no_room.status_code == 400


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/rerank", {"model": "mood", "query": "x", "documents": ["y"]}, "model"),
        ("/v1/rerank", {"model": "tags", "query": "x", "documents": ["y"]}, "model"),
        ("/v1/rerank", {"model": "fits", "query": "x", "documents": [""]}, "documents"),
        ("/v1/rerank", {"model": "taste", "query": "x", "documents": [""]}, "documents"),
        ("/v1/rerank", {"model": "fits", "query": "x", "documents": ["y", 5]}, "documents"),
        ("/v1/rerank", {"model": "fits", "query": "x", "documents": "y"}, "documents"),
        ("/v1/rerank", {"model": "fits", "query": "x", "documents": [{"text": "y", "title": "z"}]}, "documents"),
        ("/v1/rerank", {"model": "fits", "query": "x", "documents": ["y"] * 2049}, "documents"),
        ("/v1/rerank", {"model": "fits", "query": "x", "documents": ["y"], "top_n": 0}, "top_n"),
        (
            "/v1/rerank",
            {"model": "fits", "query": "x", "documents": ["y"], "max_chunks_per_doc": 3},
            "max_chunks_per_doc",
        ),
        ("/v1/score", {"model": "fits", "text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, "text_1"),
        ("/v1/score", {"model": "fits", "queries": ["a", "b"], "text_2": ["c"]}, "queries"),
        ("/v1/score", {"model": "fits", "text_1": "a"}, "text_2"),
        ("/v1/score", {"model": "fits", "text_1": "a", "text_2": "b", "documents": "c"}, "text_2"),
        ("/v1/score", {"model": "fits", "queries": ["a", ""], "documents": ["b", "c"]}, "queries"),
        ("/v1/score", {"model": "fits", "queries": "a", "documents": ["b", ""]}, "documents"),
        ("/v1/score", {"model": "base", "text_1": "", "text_2": "b"}, "text_1"),
        ("/v1/score", {"model": "base", "queries": "a", "documents": ["b", ""]}, "documents"),
        ("/v1/rerank", {"model": "fits", "query": "", "documents": ["y"]}, "query"),
        ("/v1/rerank", {"model": "base", "query": "", "documents": ["y"]}, "query"),
        ("/rerank", {"model": "base", "query": "", "texts": ["y"]}, "query"),
        ("/rerank", {"model": "fits", "query": "x", "texts": [""]}, "texts"),
        ("/v1/rerank", {"model": "base", "query": "the lazy dog " * 40, "documents": ["y"]}, "query"),
        ("/v1/score", {"model": "base", "queries": "the lazy dog " * 9000, "documents": "y"}, "queries"),
        ("/rerank", {"model": "fits", "query": "x", "texts": ["y"], "documents": ["y"]}, "documents"),
        ("/rerank", {"model": "fits", "query": "x", "texts": ["y"], "raw_scores": 3}, "raw_scores"),
    ],
)
def test_what_cannot_be_scored_is_a_400(served: Served, path: str, body: dict[str, Any], param: str) -> None:
    answer = served.post(path, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_an_empty_list_of_documents_is_called_empty_and_not_missing(served: Served) -> None:
    error = served.post("/v1/rerank", model="fits", query="x", documents=[]).json()["error"]
    assert error["param"] == "documents"
    assert "not empty" in error["message"]


def test_a_query_counts_with_each_document(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "MAX_PAIRED_CHARACTERS", 2 * (4 + 1))
    body: dict[str, Any] = {"model": "fits", "query": "four"}
    assert served.post("/v1/rerank", **body, documents=["y", "z"]).status_code == 200
    answer = served.post("/v1/rerank", **body, documents=["y", "z", "a"])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "documents")
