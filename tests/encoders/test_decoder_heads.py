"""Classifiers over decoders, in the batch of those who write, against transformers and PEFT one by one."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from manylora.lora.format.encoders import HeadedModules
from manylora.models.offered import modules_of
from tests.models.zoo import make_zoo_model
from tests.tiny_adapters import make_adapter
from tests.tiny_models import VOCAB_SIZE, make_tiny_model

from .tiny import Served, make_encoder_adapter, peft_model, serve

LABELS = {3: ["bad", "fair", "good"], 2: ["no", "yes"]}
ROOM = {"kv_cache_memory": 2**24}


def texts() -> list[list[int]]:
    random = np.random.default_rng(1)
    return [random.integers(5, VOCAB_SIZE, length).tolist() for length in (1, 17, 40, 90)]


def make_classifier(base: Path, folder: Path, count: int, **more: Any) -> Path:
    made = make_encoder_adapter(
        base, folder, model_class=AutoModelForSequenceClassification, task="SEQ_CLS", num_labels=count, **more
    )
    path = made / "adapter_config.json"
    named = {"id2label": {str(i): name for i, name in enumerate(LABELS[count])}}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    return made


@torch.inference_mode()
def wanted(base: Path, adapter: Path, count: int) -> list[np.ndarray]:
    model = peft_model(base, adapter, model_class=AutoModelForSequenceClassification, num_labels=count)
    return [model(input_ids=torch.tensor([ids])).logits[0].numpy() for ids in texts()]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_the_labels_of_adapters_on_a_decoder_are_those_of_peft(architecture: str, tmp_path: Path) -> None:
    """Other ranks, modules and numbers of labels, prompts in several steps, and writers beside them."""
    base = make_tiny_model(architecture, tmp_path / "base")
    folders = {
        "three": make_classifier(base, tmp_path / "three", 3, rank=4, seed=1),
        "two": make_classifier(base, tmp_path / "two", 2, rank=3, seed=2),
    }
    writer = make_adapter(base, tmp_path / "writer")
    asked = {"prompt": "The quick", "max_tokens": 24, "temperature": 0, "seed": 1}
    with serve(base, tmp_path / "data", max_num_batched_tokens=64, **ROOM) as served:
        for name, folder in {**folders, "writer": writer}.items():
            said = served.upload(folder, name)
            assert said.status_code == 201, said.text
        alone = served.post("/v1/completions", model="writer", **asked).json()["choices"]
        bodies = [{"model": name, "input": texts(), "use_activation": False} for name in folders] * 2

        async def ask() -> list[Any]:
            writes = served.client.post("/v1/completions", json={"model": "writer", **asked})
            return await asyncio.gather(
                writes, *(served.client.post("/v1/classify", json=body) for body in bodies), writes_again()
            )

        async def writes_again() -> Any:
            return await served.client.post("/v1/completions", json={"model": "writer", **asked})

        first, *answers, again = served.portal.call(ask)
    assert first.json()["choices"] == again.json()["choices"] == alone
    for body, answer in zip(bodies, answers, strict=True):
        assert answer.status_code == 200, answer.text
        name = str(body["model"])
        found = wanted(base, folders[name], len(answer.json()["data"][0]["probs"]))
        for entry, scores in zip(answer.json()["data"], found, strict=True):
            np.testing.assert_allclose(entry["probs"], scores, atol=2e-5)
            assert entry["label"] == LABELS[len(scores)][scores.argmax()]


@pytest.fixture(scope="module")
def served(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("decoder-heads")
    with serve(tiny_llama_dir, folder / "data", **ROOM) as served:
        assert served.upload(make_classifier(tiny_llama_dir, folder / "mood", 3), "mood").status_code == 201
        assert served.upload(make_adapter(tiny_llama_dir, folder / "writer"), "writer").status_code == 201
        yield served


def test_a_prompt_of_which_the_cache_knows_all_but_the_last_token_has_the_same_labels(served: Served) -> None:
    body = {"model": "mood", "input": [texts()[3]], "use_activation": False}
    first, again = (served.post("/v1/classify", **body).json() for _ in range(2))
    assert again["data"] == first["data"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


@pytest.mark.parametrize("model", ["base", "writer"])
def test_what_has_no_labels_says_so(served: Served, model: str) -> None:
    answer = served.post("/v1/classify", model=model, input="x")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
    assert "no labels" in answer.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ],
)
def test_a_classifier_writes_nothing(served: Served, path: str, body: dict[str, Any]) -> None:
    for named in ({"model": "mood"}, {"adapters": [{"name": "mood", "weight": 0.5}]}):
        answer = served.post(path, **named, **body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "wrong_model_type"), answer.text
        assert "/v1/classify" in answer.text
    assert served.post("/v1/embeddings", model="mood", input="x").status_code == 200


def test_a_decoder_that_has_no_class_for_labels_says_so(tmp_path: Path) -> None:
    base = make_zoo_model("granite", tmp_path / "base")
    with serve(base, tmp_path / "data", **ROOM) as decoder:
        answer = decoder.post("/v1/classify", model="base", input="x")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "wrong_model_type")
    assert "guided_choice" in answer.text


def test_heads_are_found_without_loading_the_model(tiny_llama_dir: Path) -> None:
    modules = modules_of(str(tiny_llama_dir))
    assert isinstance(modules, HeadedModules)
    assert {task: plan.source for task, plan in modules.heads.items()} == {"SEQ_CLS": "last"}
