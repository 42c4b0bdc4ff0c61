"""Heads of many adapters in one batch, against transformers and PEFT one by one, and the routes of labels."""

import json
import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from manylora.api import classify
from manylora.lora.format.heads import MAX_LABEL_LENGTH
from manylora.models.encoder_loading import offered_modules
from tests.tiny_models import VOCAB_SIZE

from .tiny import CONFIGS, Served, make_encoder, make_encoder_adapter, peft_model, serve

NAMES = {3: ["bad", "fair", "good"], 2: ["no", "yes"], 5: ["a", "b", "c", "d", "e"], 1: ["relevance"]}
# Of each adapter: labels, rank, what it adapts; norms and the pooler among it.
TUNED: dict[str, tuple[int, int, Any]] = {
    "three": (3, 4, "all-linear"),
    "two": (2, 8, ["query", "value", "q_lin", "v_lin", "Wqkv"]),
    "five": (5, 3, ["key", "dense", "k_lin", "lin1", "Wi"]),
}
# What a class has between encoder and head, which PEFT does not save by itself; DistilBERT's `pre_classifier` it does,
# since that ends in "classifier".
BETWEEN = {"modernbert": ["head"]}


def inputs() -> list[list[int]]:
    random = np.random.default_rng(1)
    return [[0, *random.integers(5, VOCAB_SIZE, length).tolist(), 2] for length in (3, 17, 40, 17)]


def label(folder: Path, count: int, **more: Any) -> Path:
    """Names for the outputs, which PEFT does not save."""
    path = folder / "adapter_config.json"
    named = {"id2label": {str(i): name for i, name in enumerate(NAMES[count])}}
    path.write_text(json.dumps(json.loads(path.read_text()) | named | more))
    return folder


def make_classifier(
    base: Path, folder: Path, name: str, *, kind: str = "bert", task: str = "SEQ_CLS", seed: int = 0, **more: Any
) -> Path:
    count, rank, targets = TUNED[name]
    if targets == "all-linear" and kind == "modernbert":
        targets = r".*\.(Wqkv|Wi|Wo)"
    made = make_encoder_adapter(
        base,
        folder,
        model_class=AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForTokenClassification,
        task=task,
        rank=rank,
        targets=targets,
        num_labels=count,
        seed=seed,
        modules_to_save=BETWEEN.get(kind),
        exclude_modules=["pre_classifier"] if kind == "distilbert" else None,
    )
    return label(made, count, **more)


@lru_cache(maxsize=1)
def oracle(base: Path, adapter: Path, count: int, task: str) -> Any:
    auto = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForTokenClassification
    return peft_model(base, adapter, model_class=auto, num_labels=count)


@torch.inference_mode()
def scores_of(base: Path, adapter: Path, count: int, task: str, token_ids: list[int]) -> np.ndarray:
    found: np.ndarray = oracle(base, adapter, count, task)(input_ids=torch.tensor([token_ids])).logits[0].numpy()
    return found


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_labels_of_all_adapters_in_one_batch_are_those_of_peft(kind: str, tmp_path: Path) -> None:
    """Heads of other widths, other ranks and modules, of texts and of tokens, and embeddings beside them."""
    base = make_encoder(kind, tmp_path / "base")
    folders = {name: make_classifier(base, tmp_path / name, name, kind=kind, seed=i) for i, name in enumerate(TUNED)}
    folders["tokens"] = make_classifier(base, tmp_path / "tokens", "two", kind=kind, task="TOKEN_CLS", seed=9)
    with serve(base, tmp_path / "data") as served:
        for name, folder in folders.items():
            said = served.upload(folder, name)
            assert said.status_code == 201, said.text
        bodies = [{"model": name, "input": inputs(), "use_activation": False} for name in folders] * 2
        embedded = served.post("/v1/embeddings", model="base", input=inputs()).json()["data"]
        answers = served.together("/v1/classify", bodies)
        beside = served.post("/v1/embeddings", model="base", input=inputs()).json()["data"]
    assert embedded == beside
    for body, answer in zip(bodies, answers, strict=True):
        assert answer.status_code == 200, answer.text
        name = str(body["model"])
        task = "TOKEN_CLS" if name == "tokens" else "SEQ_CLS"
        count = TUNED.get(name, TUNED["two"])[0]
        for token_ids, entry in zip(inputs(), answer.json()["data"], strict=True):
            wanted = scores_of(base, folders[name], count, task, token_ids)
            assert entry["num_classes"] == count
            if task == "SEQ_CLS":
                np.testing.assert_allclose(entry["probs"], wanted, atol=1e-5)
                assert entry["label"] == NAMES[count][wanted.argmax()]
            else:
                np.testing.assert_allclose([each["score"] for each in entry["tokens"]], wanted.max(-1), atol=1e-5)
                assert [each["entity"] for each in entry["tokens"]] == [NAMES[count][i] for i in wanted.argmax(-1)]


# one server for the rest


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder("bert", tmp_path_factory.mktemp("classify") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    folder = base.parent
    return {
        "mood": make_classifier(base, folder / "mood", "three", seed=1),
        "topics": make_classifier(base, folder / "topics", "five", seed=2, problem_type="multi_label_classification"),
        "price": make_classifier(base, folder / "price", "two", seed=3, problem_type="regression"),
        "plain": make_encoder_adapter(base, folder / "plain"),
        "tags": make_classifier(base, folder / "tags", "two", task="TOKEN_CLS", seed=4),
    }


@pytest.fixture(scope="module")
def served(base: Path, adapters: dict[str, Path]) -> Iterator[Served]:
    with serve(base, base.parent / "data") as served:
        for name, folder in adapters.items():
            said = served.upload(folder, name)
            assert said.status_code == 201, said.text
        yield served


def raw(served: Served, model: str, text: Any) -> np.ndarray:
    answer = served.post("/v1/classify", model=model, input=text, use_activation=False)
    return np.array(answer.json()["data"][0]["probs"])


def test_the_answer_is_vllms(served: Served) -> None:
    answer = served.post("/v1/classify", model="mood", input=["fine day", "x"]).json()
    assert answer["object"] == "list"
    assert answer["model"] == "mood"
    assert answer["id"].startswith("classify-")
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] > 0
    assert [entry["index"] for entry in answer["data"]] == [0, 1]
    scores = raw(served, "mood", "fine day")
    found = answer["data"][0]
    np.testing.assert_allclose(found["probs"], np.exp(scores) / np.exp(scores).sum(), atol=1e-6)
    assert found["num_classes"] == 3
    assert found["label"] == found["labels"][0]["label"] == NAMES[3][scores.argmax()]
    assert [each["score"] for each in found["labels"]] == sorted(found["probs"], reverse=True)
    assert "chosen" not in found


def test_several_labels_may_hold_at_once(served: Served) -> None:
    scores = raw(served, "topics", "fine day")
    shares = 1 / (1 + np.exp(-scores))
    for threshold in (None, 0.2, 0.8):
        asked = {} if threshold is None else {"threshold": threshold}
        [found] = served.post("/v1/classify", model="topics", input="fine day", **asked).json()["data"]
        np.testing.assert_allclose(found["probs"], shares, atol=1e-6)
        assert sorted(found["chosen"]) == [
            name for name, share in zip(NAMES[5], shares, strict=True) if share >= (threshold or 0.5)
        ]
        as_scores = served.post("/v1/classify", model="topics", input="fine day", use_activation=False, **asked)
        assert as_scores.json()["data"][0]["chosen"] == found["chosen"], "a threshold is a share, whatever is told"


def test_numbers_stay_as_they_are(served: Served) -> None:
    [found] = served.post("/v1/classify", model="price", input="fine day").json()["data"]
    assert found["probs"] == raw(served, "price", "fine day").tolist()


@pytest.mark.parametrize(("model", "per_input"), [("tags", 19), ("topics", 5)])
def test_a_long_answer_is_built_beside_the_event_loop_and_bounded(
    model: str, per_input: int, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"model": model, "input": [inputs()[1]] * 3}
    wanted = served.post("/v1/classify", **asked).json()["data"]
    threads, known = set(), classify.shares
    counted, count = list[int](), classify._num_told

    def told(num_ids: int, head: Any) -> int:
        counted.append(num_ids)
        return count(num_ids, head)

    monkeypatch.setattr(classify, "_num_told", told)

    def seen(*given: Any, **how: Any) -> Any:
        threads.add(threading.current_thread().name)
        return known(*given, **how)

    monkeypatch.setattr(classify, "_INLINE_LABELS", per_input - 1)
    monkeypatch.setattr(classify, "MAX_LABELS_TOLD", 3 * per_input)
    monkeypatch.setattr(classify, "shares", seen)

    answer = served.post("/v1/classify", **asked)
    assert answer.json()["data"] == wanted
    assert threads == {"parser_0"}
    assert len(counted) == 3 + 3, "all inputs once, and each when it is told"
    for path, field, value in (("/v1/classify", "input", asked["input"] * 2), ("/classify", "inputs", ["x " * 20] * 4)):
        refused = served.post(path, model=model, **{field: value})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
        assert "labels" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "base", "input": "x"}, "model"),
        ({"model": "plain", "input": "x"}, "model"),
        ({"adapters": [{"name": "mood", "weight": 0.5}, {"name": "plain", "weight": 0.5}], "input": "x"}, "model"),
        ({"model": "mood", "input": "x", "threshold": 0.5}, "threshold"),
        ({"model": "mood", "input": "x", "pooling": "mean"}, "pooling"),
        ({"model": "mood", "input": []}, "input"),
        ({"model": "mood", "input": "x", "stream": True}, "stream"),
    ],
)
def test_what_cannot_be_told_is_a_400(served: Served, body: dict[str, Any], param: str) -> None:
    answer = served.post("/v1/classify", **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_both_dialects_share_a_path(served: Served) -> None:
    """vLLM's alias by `input`; text-embeddings-inference's list, or for a list of texts its lists, by `inputs`."""
    [wanted] = served.post("/v1/classify", model="mood", input="fine day").json()["data"]
    [alias] = served.post("/classify", model="mood", input="fine day").json()["data"]
    assert alias == wanted
    assert served.post("/classify", model="mood", inputs="fine day").json() == wanted["labels"]
    both = served.post("/classify", adapter_id="mood", inputs=["fine day", "fine day"]).json()
    assert both == [wanted["labels"]] * 2
    scores = served.post("/classify", model="mood", inputs="fine day", raw_scores=True).json()
    assert sorted(each["score"] for each in scores) == sorted(raw(served, "mood", "fine day"))
    assert served.post("/classify", model="mood", inputs="fine day", user="u", raw_scores=None).status_code == 200
    assert served.post("/classify", model="mood", inputs="fine day " * 99).status_code == 400
    assert served.post("/classify", model="mood", inputs="fine day " * 99, truncate=True).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"inputs": []}, "inputs"),
        ({"inputs": [1]}, "inputs"),
        ({"inputs": "x", "truncate": 3}, "truncate"),
        ({"inputs": "x", "truncation_direction": "left"}, "truncation_direction"),
        ({"inputs": "x", "poetry": True}, "poetry"),
        ({"inputs": "x", "raw_scores": "x"}, "raw_scores"),
        ({"inputs": "x", "input": "y"}, "input"),
        ({"inputs": "x", "use_activation": True}, "use_activation"),
        ({"inputs": "x", "threshold": 0.2}, "threshold"),
        ({"inputs": "x", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ({"inputs": ["x"] * 2049}, "inputs"),
        ({"inputs": "x", "user": 5}, "user"),
    ],
)
def test_what_the_other_dialect_cannot_say_is_a_400(served: Served, body: dict[str, Any], param: str) -> None:
    answer = served.post("/classify", model="mood", **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


@pytest.mark.parametrize("path", ["/v1/classify", "/classify"])
def test_labels_are_charged(served: Served, path: str) -> None:
    body = {"model": "mood", "input": "one two"}
    before = served.get("/v1/usage").json()["total"]
    assert served.post(path, **body).status_code == 200
    after = served.get("/v1/usage").json()["total"]
    assert (after["requests"] - before["requests"], after["prompt_tokens"] > before["prompt_tokens"]) == (1, True)
    with served.nothing_left():
        assert served.post(path, **body).json()["error"]["code"] == "quota_exceeded"


def test_an_encoder_has_no_messages_to_count(served: Served) -> None:
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        more = {} if path.endswith("tokens") else {"max_tokens": 5}
        answer = served.post(path, model="mood", messages=[{"role": "user", "content": "x"}], **more)
        assert (answer.status_code, "is an encoder" in answer.text) == (400, True), answer.text


# what is refused


def changed(source: Path, folder: Path, *, config: dict[str, Any] | None = None, **tensors: Any) -> Path:
    """A copy of an adapter with other config keys and tensors; None takes one out."""
    folder.mkdir()
    found = json.loads((source / "adapter_config.json").read_text()) | (config or {})
    (folder / "adapter_config.json").write_text(json.dumps(found))
    stored = load_file(source / "adapter_model.safetensors")
    for name, value in tensors.items():
        key = f"base_model.model.{name}"
        if value is None:
            del stored[key]
        else:
            stored[key] = value
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def refused(served: Served, folder: Path) -> set[str]:
    answer = served.upload(folder, "refused")
    assert answer.status_code == 422, answer.text
    return {problem["code"] for problem in answer.json()["error"]["problems"]}


@pytest.mark.parametrize(
    ("tensors", "code"),
    [
        ({"classifier.weight": None}, "head_missing"),
        ({"classifier.weight": torch.ones(3, 47)}, "head_shape"),
        ({"classifier.weight": torch.ones(48)}, "head_shape"),
        ({"classifier.bias": torch.ones(2)}, "head_shape"),
        ({"classifier.weight": torch.full((3, 48), float("nan"))}, "not_finite"),
        ({"classifier.weight": torch.zeros(3, 48)}, "no_effect"),
        ({"classifier.weight": torch.ones(4, 48), "classifier.bias": torch.ones(4)}, "head_labels"),
        ({"classifier.weight": torch.ones(3, 48, dtype=torch.int64)}, "wrong_dtype"),
    ],
)
def test_heads_that_cannot_be_right_are_refused(
    tensors: dict[str, Any], code: str, served: Served, adapters: dict[str, Path], tmp_path: Path
) -> None:
    assert refused(served, changed(adapters["mood"], tmp_path / "changed", **tensors)) == {code}


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, "head_labels"),
        ({"id2label": {"0": "a", "1": "b", "3": "c"}}, "head_labels"),
        ({"id2label": ["a", "b", "c"]}, "head_labels"),
        ({"id2label": {"0": "a", "1": "a", "2": "c"}}, "head_labels"),
        ({"id2label": {"0": "a", "1": "", "2": "c"}}, "head_labels"),
        ({"id2label": {"0": "a", "1": "b" * (MAX_LABEL_LENGTH + 1), "2": "c"}}, "head_labels"),
        ({"problem_type": "poetry"}, "bad_config"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "unsupported_feature"),
        ({"modules_to_save": ["classifier", "score", "encoder.layer.0.attention.self"]}, "missing_tensor"),
    ],
)
def test_configs_that_do_not_fit_the_head_are_refused(
    config: dict[str, Any], code: str, served: Served, adapters: dict[str, Path], tmp_path: Path
) -> None:
    assert code in refused(served, changed(adapters["mood"], tmp_path / "changed", config=config))


def test_labels_without_names_are_numbered_with_a_warning(
    served: Served, adapters: dict[str, Path], tmp_path: Path
) -> None:
    answer = served.upload(changed(adapters["mood"], tmp_path / "changed", config={"id2label": None}), "numbered")
    assert "id2label" in " ".join(answer.json()["report"]["warnings"])
    [found] = served.post("/v1/classify", model="numbered", input="x").json()["data"]
    assert sorted(each["label"] for each in found["labels"]) == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_a_layer_before_the_head_that_nobody_has_is_refused(tmp_path: Path) -> None:
    """PEFT does not save it by itself; its weights were random in training."""
    base = make_encoder("modernbert", tmp_path / "base")
    count, _, targets = TUNED["two"]
    adapter = make_encoder_adapter(
        base,
        tmp_path / "adapter",
        model_class=AutoModelForSequenceClassification,
        task="SEQ_CLS",
        targets=targets,
        num_labels=count,
    )
    with serve(base, tmp_path / "data") as served:
        assert refused(served, adapter) == {"head_untrained"}


def test_a_layer_before_the_head_may_be_the_bases(tmp_path: Path) -> None:
    """A checkpoint of a classifier has it, and PEFT trains and runs the head on top of it."""
    base = make_encoder("modernbert", tmp_path / "base", model_class=AutoModelForSequenceClassification)
    adapter = make_encoder_adapter(
        base,
        tmp_path / "adapter",
        model_class=AutoModelForSequenceClassification,
        task="SEQ_CLS",
        targets=TUNED["two"][2],
        num_labels=2,
    )
    with serve(base, tmp_path / "data") as served:
        assert served.upload(label(adapter, 2), "two").status_code == 201
        for token_ids in inputs():
            wanted = scores_of(base, adapter, 2, "SEQ_CLS", token_ids)
            np.testing.assert_allclose(raw(served, "two", token_ids), wanted, atol=1e-5)


def test_heads_are_found_without_loading_the_model(base: Path) -> None:
    heads = offered_modules(base).heads
    found = {task: plan.source for task, plan in heads.items()}
    assert found == {"SEQ_CLS": "pooler", "TOKEN_CLS": "every", "QUESTION_ANS": "every"}
