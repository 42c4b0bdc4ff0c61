"""Encoders of images: adapters and heads of many tenants in one batch, against transformers and PEFT one by one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional

from manylora.api import pictures
from manylora.errors import ModelUnusable
from manylora.models.image_loading import is_image_model, offered_image_modules
from manylora.models.memory_report import memory_report
from manylora.models.offered import modules_of
from manylora.serving.parts import load_foundation
from manylora.settings import Settings
from tests.encoders.tiny import Served, make_encoder, serve

from .tiny import (
    CONFIGS,
    PREFIXES,
    file_of,
    make_image_adapter,
    make_image_model,
    part_of,
    picture,
    url_of,
    wanted_scores,
    wanted_states,
)

IMAGES = [picture(seed, *size) for seed, size in enumerate([(40, 60), (32, 32), (90, 31)])]
PARTS = [part_of(file_of(image)) for image in IMAGES]
LABELS = {"two": ["no", "yes"], "three": ["cat", "dog", "owl"], "five": ["a", "b", "c", "d", "e"]}
TARGETS: dict[str, Any] = {"two": ["q_proj", "v_proj"], "three": r".*layers?\.\d+\..*(proj|fc1)", "five": "all-linear"}


@pytest.mark.parametrize("kind", PREFIXES)
def test_the_labels_of_all_adapters_in_one_batch_are_those_of_peft(kind: str, tmp_path: Path) -> None:
    base = make_image_model(kind, tmp_path / "base")
    folders = {
        name: make_image_adapter(base, tmp_path / name, labels, rank=2 + i, targets=TARGETS[name], seed=i)
        for i, (name, labels) in enumerate(LABELS.items())
    }
    with serve(base, tmp_path / "data") as served:
        for name, folder in folders.items():
            said = served.upload(folder, name)
            assert said.status_code == 201, said.text
            assert said.json()["report"]["head"]["labels"] == LABELS[name]
        bodies = [{"model": name, "input": PARTS, "use_activation": False} for name in folders]
        alone = [served.post("/v1/classify", **body).json()["data"] for body in bodies]
        embedded = served.post("/v1/embeddings", model="base", input=PARTS, pooling="mean").json()["data"]
        answers = served.together("/v1/classify", bodies * 2)
        beside = served.post("/v1/embeddings", model="base", input=PARTS, pooling="mean").json()["data"]
    assert embedded == beside
    wanted = functional.normalize(wanted_states(base, IMAGES).mean(dim=1), dim=1)
    np.testing.assert_allclose([each["embedding"] for each in embedded], wanted.numpy(), atol=1e-6)
    for number, answer in enumerate(answers):
        name = list(folders)[number % len(folders)]
        assert answer.json()["data"] == alone[number % len(folders)]
        scores = wanted_scores(base, folders[name], len(LABELS[name]), IMAGES)
        for entry, row in zip(answer.json()["data"], scores, strict=True):
            np.testing.assert_allclose(entry["probs"], row, atol=1e-5)
            assert entry["label"] == LABELS[name][row.argmax()]


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_adapters_may_touch_is_known_without_loading_the_model(kind: str, tmp_path: Path) -> None:
    base = make_image_model(kind, tmp_path / "base")
    offered = offered_image_modules(base)
    assert is_image_model(base)
    assert set(offered.heads) == (set() if kind == "clip" else {"SEQ_CLS"})
    settings = Settings(model=str(base), device="cpu", dtype="float32")
    held = load_foundation(settings).modules
    assert {path: spec.kind for path, spec in held.items()} == {path: spec.kind for path, spec in offered.items()}
    assert modules_of(str(base)) == offered
    weights = sum(spec.in_features * spec.out_features for spec in offered.values() if spec.kind == "linear")
    assert memory_report(settings).linears >= 4 * weights


def test_a_tower_of_clip_gives_vectors(tmp_path: Path) -> None:
    """Transformers has no class with labels for it; its processor cuts the middle out of an image."""
    base = make_image_model("clip", tmp_path / "base", processor="clip")
    with serve(base, tmp_path / "data") as served:
        found = served.post("/v1/embeddings", model="base", input=url_of(file_of(IMAGES[2])))
    wanted = functional.normalize(wanted_states(base, [IMAGES[2]])[:, 0], dim=1)
    np.testing.assert_allclose(found.json()["data"][0]["embedding"], wanted[0].numpy(), atol=1e-6)


def test_a_model_of_images_that_cannot_be_served_says_why(tmp_path: Path) -> None:
    base = make_image_model("vit", tmp_path / "base")
    (base / "preprocessor_config.json").unlink()
    with pytest.raises(ModelUnusable, match=r"no preprocessor_config\.json"), serve(base, tmp_path / "a"):
        pass
    other = make_image_model("vit", tmp_path / "other", processor="clip", image_size=16)
    with pytest.raises(ModelUnusable, match="makes images of"), serve(other, tmp_path / "b"):
        pass
    gray = make_image_model("vit", tmp_path / "gray", num_channels=1)
    with pytest.raises(ModelUnusable, match="images of 1 channels"), serve(gray, tmp_path / "c"):
        pass


# one server for the rest


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("images")
    base = make_image_model("vit", folder / "base")
    adapter = make_image_adapter(base, folder / "animals", LABELS["three"])
    with serve(base, folder / "data") as served:
        assert served.upload(adapter, "animals").status_code == 201
        yield served


def test_every_dialect_gives_the_same(served: Served) -> None:
    data = file_of(IMAGES[0])
    url = url_of(data)
    asked: list[dict[str, Any]] = [
        {"input": [part_of(data)]},
        {"input": part_of(data)},
        {"input": [{"type": "image_url", "image_url": url}]},
        {"input": url},
        {"input": [url]},
        {"messages": [{"role": "user", "content": [part_of(data)]}]},
    ]
    for route, model, more in (("/v1/embeddings", "base", {"modality": "image"}), ("/v1/classify", "animals", {})):
        answers = [served.post(route, model=model, **body) for body in [*asked, {"input": url, **more}]]
        assert [answer.status_code for answer in answers] == [200] * len(answers), [each.text for each in answers]
        assert all(answer.json()["data"] == answers[0].json()["data"] for answer in answers)
        assert answers[0].json()["usage"]["prompt_tokens"] == 17
    ours = served.post("/classify", model="animals", input=url).json()["data"][0]["labels"]
    assert served.post("/classify", model="animals", inputs=[url, url]).json() == [ours, ours]
    assert served.post("/classify", model="animals", inputs=url).json() == ours


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ({"input": "https://example.com/cat.png"}, "invalid_image", "An address is not fetched"),
        ({"input": "file:///etc/passwd"}, "invalid_image", "An address is not fetched"),
        ({"input": "a cat"}, "invalid_image", "must be a data URL"),
        ({"input": "data:image/png,abc"}, "invalid_image", "in base64"),
        ({"input": "data:image/png;base64,????"}, "invalid_image", "no base64"),
        ({"input": "data:image/png;base64,"}, "invalid_image", "begins as no file"),
        ({"input": [part_of(b"GIF89a")]}, "invalid_image", "cannot be read"),
        ({"input": [PARTS[0], part_of(file_of(IMAGES[0])[:-300])]}, "invalid_image", "'input', number 1: "),
        ({"input": [1, 2]}, None, "holds token ids"),
        ({"input": [PARTS[0], "text"]}, None, "must be a string"),
        ({"input": [{"type": "text", "text": "cat"}]}, None, "image_url"),
        ({"input": [{"type": "image_url", "image_url": {"url": "data:", "detail": "high"}}]}, None, "detail"),
        ({"input": PARTS[0], "truncate_prompt_tokens": 5}, None, "is for texts"),
        ({"input": [PARTS[0]] * (pictures.MAX_IMAGES + 1)}, None, "more than 64 images"),
        ({"input": [PARTS[0]["image_url"]["url"]] * (pictures.MAX_IMAGES + 1)}, None, "more than 64 images"),
        ({"messages": [{"role": "user", "content": [PARTS[0], PARTS[1]]}]}, None, "one image_url part"),
        ({"messages": [{"role": "user", "content": "cat"}]}, "unsupported_field", "messages"),
    ],
)
def test_what_is_no_image_is_refused_in_one_sentence(
    served: Served, body: dict[str, Any], code: str | None, said: str
) -> None:
    answer = served.post("/v1/classify", model="animals", **body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert said in error["message"]
    assert error["param"].partition(".")[0] in ("input", "messages", "truncate_prompt_tokens")
    assert code is None or error["code"] == code


def test_routes_of_texts_name_the_right_kind_of_model(served: Served, tmp_path: Path) -> None:
    asked: dict[str, dict[str, Any]] = {
        "/v1/completions": {"model": "base", "prompt": "a"},
        "/v1/chat/completions": {"model": "base", "messages": [{"role": "user", "content": "a"}]},
        "/v1/rerank": {"model": "base", "query": "a", "documents": ["b"]},
        "/v1/score": {"model": "base", "text_1": "a", "text_2": "b"},
        "/tokenize": {"model": "base", "prompt": "a"},
    }
    for route, body in asked.items():
        answer = served.post(route, **body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "wrong_model_type"), route
    said_text = served.post("/v1/embeddings", model="base", input=url_of(file_of(IMAGES[0])), modality="text")
    assert (said_text.status_code, said_text.json()["error"]["code"]) == (400, "wrong_model_type")
    with serve(make_encoder("bert", tmp_path / "texts"), tmp_path / "data") as texts:
        for body in ({"input": PARTS}, {"input": url_of(file_of(IMAGES[0])), "modality": "image"}):
            answer = texts.post("/v1/embeddings", model="base", **body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "wrong_model_type")


def test_what_images_become_is_held_as_memory_of_their_tenant(served: Served, tmp_path: Path) -> None:
    """A file of one colour is a hundredth of what it becomes."""
    plain = [part_of(file_of(Image.new("RGB", (32, 32))))] * 64
    assert served.post("/v1/embeddings", model="base", input=plain).status_code == 200
    with serve(
        Path(str(served.parts.settings.model)), tmp_path / "data", max_body=2**18, max_body_memory=2**20
    ) as small:
        assert small.post("/v1/embeddings", model="base", input=plain[:30]).status_code == 200
        assert small.post("/v1/embeddings", model="base", input=plain[:30]).status_code == 200
        answer = small.post("/v1/embeddings", model="base", input=plain)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_an_upload_that_does_nothing_is_told(served: Served, tmp_path: Path) -> None:
    """A head whose scores are the same for any image, which only running it shows."""
    folder = make_image_adapter(Path(str(served.parts.settings.model)), tmp_path / "idle", LABELS["two"], seed=8)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.classifier.weight"
    save_file({**tensors, name: torch.zeros_like(tensors[name])}, folder / "adapter_model.safetensors")
    answer = served.upload(folder, "idle")
    assert answer.status_code == 422
    assert "no_effect" in answer.text
