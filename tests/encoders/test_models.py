"""Encoders of many architectures in one ragged batch, against transformers and PEFT one by one."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, BertConfig, BertLMHeadModel

from manylora.errors import InvalidSettings, ModelUnusable
from manylora.kernels import native
from manylora.models.encoder import first_position
from manylora.models.encoder_loading import is_encoder, load_encoder, offered_modules
from manylora.models.sentence import SentenceSettings, sentence_settings
from manylora.serving.parts import load_foundation
from manylora.settings import Settings
from tests.tiny_models import VOCAB_SIZE

from .tiny import (
    CONFIGS,
    PAD,
    PREFIXES,
    SEP,
    Served,
    make_encoder,
    make_encoder_adapter,
    make_sentence_folder,
    peft_model,
    serve,
)

Vector = np.ndarray
LENGTHS = (1, 40, 7, 7, 64, 2)


def inputs() -> list[list[int]]:
    random = np.random.default_rng(0)
    return [[0, *random.integers(5, VOCAB_SIZE, length - 1).tolist()][:length] for length in LENGTHS]


@torch.inference_mode()
def mean_of(model: Any, token_ids: list[int]) -> Vector:
    states = model(input_ids=torch.tensor([token_ids])).last_hidden_state[0]
    vector: Vector = torch.nn.functional.normalize(states.mean(0), dim=0).numpy()
    return vector


def vectors(served: Served, model: str, given: Any, **body: Any) -> list[Vector]:
    answer = served.post("/v1/embeddings", model=model, input=given, **body)
    assert answer.status_code == 200, answer.text
    return [np.array(entry["embedding"], dtype=np.float32) for entry in answer.json()["data"]]


@pytest.mark.parametrize("kind", CONFIGS)
def test_vectors_are_those_of_transformers_and_peft(kind: str, tmp_path: Path) -> None:
    """Base and two adapters with and without the name that the encoder has in a model with a head, all at once."""
    base = make_encoder(kind, tmp_path / "base")
    bare = make_encoder_adapter(base, tmp_path / "bare", seed=1)
    inner = make_encoder_adapter(
        base, tmp_path / "inner", model_class=AutoModelForMaskedLM, task=None, rank=7, seed=2,
        targets=rf"{PREFIXES[kind]}\..*layers?\.\d.*\.(query|key|q_lin|lin1|dense|Wqkv|Wi)",
    )  # fmt: skip
    adapters = {"base": None, "bare": bare, "inner": inner}
    with serve(base, tmp_path / "data") as served:
        for name, folder in (("bare", bare), ("inner", inner)):
            said = served.upload(folder, name)
            assert said.status_code == 201, said.text
        bodies = [{"model": name, "input": inputs(), "encoding_format": "float"} for name in adapters]
        answers = served.together("/v1/embeddings", bodies)
    for (name, adapter), answer in zip(adapters.items(), answers, strict=True):
        assert answer.status_code == 200, answer.text
        whole = peft_model(base, adapter, model_class=AutoModelForMaskedLM if name == "inner" else AutoModel)
        model = getattr(whole.base_model.model, PREFIXES[kind]) if name == "inner" else whole
        for token_ids, entry in zip(inputs(), answer.json()["data"], strict=True):
            np.testing.assert_allclose(entry["embedding"], mean_of(model, token_ids), atol=2e-6)


# what a folder says


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """BERT as sentence-transformers saves it, without normalisation, its first token being the vector."""
    folder = make_encoder("bert", tmp_path_factory.mktemp("bert") / "base")
    make_sentence_folder(folder, normalizes=False, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    make_encoder_adapter(folder, folder.parent / "tuned", targets=["query", "value"])
    with serve(folder, folder.parent / "data", max_num_batched_tokens=96) as served:
        assert served.upload(folder.parent / "tuned", "tuned").status_code == 201
        yield served


@pytest.fixture(scope="module")
def folder(served: Served) -> Path:
    assert served.parts.settings.model is not None
    return Path(served.parts.settings.model)


@torch.inference_mode()
def states_of(folder: Path, token_ids: list[int]) -> Vector:
    states: Vector = peft_model(folder, None)(input_ids=torch.tensor([token_ids])).last_hidden_state[0].numpy()
    return states


def test_pooling_and_normalisation_are_the_folders_unless_the_request_says(served: Served, folder: Path) -> None:
    token_ids = inputs()[2]
    states = states_of(folder, token_ids)
    [first], [last], [mean] = (
        vectors(served, "base", token_ids, **body) for body in ({}, {"pooling": "last"}, {"pooling": "mean"})
    )
    np.testing.assert_allclose(first, states[0], atol=2e-6)
    np.testing.assert_allclose(last, states[-1], atol=2e-6)
    np.testing.assert_allclose(mean, states.mean(0), atol=2e-6)
    assert np.linalg.norm(first) != pytest.approx(1.0, abs=0.1)


def test_an_input_gets_what_it_gets_alone_whatever_is_beside_it(served: Served) -> None:
    """To the last bit with the C++ kernels, whose products of a row do not depend on the others."""
    alone = {
        (model, number): vectors(served, model, token_ids)[0]
        for model in ("base", "tuned")
        for number, token_ids in enumerate(inputs())
    }
    bodies = [{"model": model, "input": inputs()} for model in ("base", "tuned")] * 3
    for body, answer in zip(bodies, served.together("/v1/embeddings", bodies), strict=True):
        for entry in answer.json()["data"]:
            wanted = alone[str(body["model"]), entry["index"]]
            found = np.array(entry["embedding"], dtype=np.float32)
            if native.is_available():
                np.testing.assert_array_equal(found, wanted)
            else:
                np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_an_input_is_as_long_as_the_positions_and_longer_ones_are_refused_or_cut(served: Served, folder: Path) -> None:
    """The special tokens stay where they are."""
    whole = [0, *[7] * 64, SEP]
    assert len(vectors(served, "base", whole)) == 1
    refused = served.post("/v1/embeddings", model="base", input=[*whole, 5])
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "'truncate_prompt_tokens': -1" in refused.json()["error"]["message"]
    text = "x y " * 200
    ids = served.parts.engine.codec.encode(text)
    assert len(ids) > 66
    for most, kept in ((-1, [*ids[:65], SEP]), (9, [*ids[:8], SEP]), (1, ids[:1])):
        [cut] = vectors(served, "base", text, truncate_prompt_tokens=most)
        np.testing.assert_allclose(cut, states_of(folder, kept)[0], atol=2e-6)
    [cut] = vectors(served, "base", list(range(4, 100)), truncate_prompt_tokens=5)
    np.testing.assert_allclose(cut, states_of(folder, [4, 5, 6, 7, 8])[0], atol=2e-6)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"model": "nobody", "prompt": "hi"}),
        ("/generate", {"inputs": "hi"}),
        ("/api/generate", {"model": "base", "prompt": "hi"}),
    ],
)
def test_routes_that_write_say_that_the_model_does_not(served: Served, path: str, body: dict[str, Any]) -> None:
    answer = served.post(path, **body)
    assert answer.status_code == 400
    assert "turns texts into vectors" in answer.text


def test_a_decoders_first_token_is_no_embedding(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with serve(tiny_llama_dir, tmp_path / "data", kv_cache_memory=2**24) as decoder:
        answer = decoder.post("/v1/embeddings", model="base", input="hi", pooling="cls")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "pooling")
    with pytest.raises(InvalidSettings, match="first token has seen no other"):
        serve_nothing(tiny_llama_dir, tmp_path, embedding_pooling="cls")


def serve_nothing(folder: Path, tmp_path: Path, **settings: Any) -> None:
    with serve(folder, tmp_path / "nothing", kv_cache_memory=2**24, **settings):
        pass


# adapters


@pytest.mark.parametrize(
    ("task", "changes", "code"),
    [
        ("CAUSAL_LM", {}, "unsupported_feature"),
        ("SEQ_2_SEQ_LM", {}, "unsupported_feature"),
        ("POETRY", {}, "bad_config"),
        (None, {"target_modules": ["q_proj"]}, "unmatched_module"),
    ],
)
def test_adapters_of_other_tasks_are_refused(
    task: str | None, changes: dict[str, Any], code: str, served: Served, folder: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_bytes((folder.parent / "tuned" / name).read_bytes())
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"task_type": task, **changes}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    answer = served.upload(adapter, "other")
    assert answer.status_code == 422, answer.text
    assert code in {problem["code"] for problem in answer.json()["error"]["problems"]}


def test_an_adapter_that_changes_nothing_is_refused_by_what_it_does(
    served: Served, folder: Path, tmp_path: Path
) -> None:
    """Its numbers are not zero, but they are those of the pooler, which no vector comes from."""
    make_encoder_adapter(folder, tmp_path / "adapter", targets=r"pooler\.dense")
    answer = served.upload(tmp_path / "adapter", "pooler")
    assert {problem["code"] for problem in answer.json()["error"]["problems"]} == {"no_effect"}


def test_a_mix_that_is_materialised_is_an_adapter_of_the_encoder(served: Served, folder: Path, tmp_path: Path) -> None:
    """The one that PEFT makes of them."""
    make_encoder_adapter(folder, tmp_path / "other", targets=["query", "value"], seed=3)
    assert served.upload(tmp_path / "other", "another").status_code == 201
    weights = {"tuned": 0.7, "another": -0.3}
    mix = [{"name": name, "weight": weight} for name, weight in weights.items()]
    said = served.post("/v1/adapters", name="merged", mix=mix, materialise="ties", density=0.5)
    assert said.status_code == 201, said.text
    stored = served.parts.catalog.local_folder(served.parts.catalog.directory.resolve("public", "merged"))
    assert json.loads((stored / "adapter_config.json").read_text())["task_type"] == "FEATURE_EXTRACTION"

    model = peft_model(folder, folder.parent / "tuned")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_adapter(tmp_path / "other", "another")
        model.add_weighted_adapter(
            ["default", "another"], [*weights.values()], "merged", combination_type="ties", density=0.5
        )
        model.set_adapter("merged")
    [found] = vectors(served, "merged", inputs()[2])
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([inputs()[2]])).last_hidden_state[0, 0].numpy()
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    assert np.abs(found - states_of(folder, inputs()[2])[0]).max() > 1e-3


def test_what_is_checked_without_a_server_is_what_the_server_offers(served: Served, folder: Path) -> None:
    foundation = load_foundation(served.parts.settings)
    assert set(offered_modules(folder).values()) == {
        replace(spec, shares_input=False) for spec in foundation.modules.values()
    }


# starting


def test_a_checkpoint_of_pretraining_is_served_without_its_head(tmp_path: Path) -> None:
    """It has no pooler, which transformers would fill with random numbers."""
    base = make_encoder("bert", tmp_path / "base", model_class=AutoModelForMaskedLM)
    loaded = load_encoder(Settings(device="cpu", dtype="float32"), base)
    assert loaded.model.pooler is None
    assert not any(path.startswith("pooler") for path in offered_modules(base))
    assert offered_modules(base).keys() == {
        path for path in offered_modules(make_encoder("bert", tmp_path / "whole")) if not path.startswith("pooler")
    }


@pytest.mark.parametrize(("kind", "first"), [("bert", 0), ("roberta", PAD + 1), ("modernbert", 0)])
def test_positions_begin_where_the_model_has_them_begin(kind: str, first: int, tmp_path: Path) -> None:
    assert first_position(peft_model(make_encoder(kind, tmp_path / kind), None)) == first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 67}, "67 is more than the 66 positions"),
        ({"max_model_len": 60, "max_num_batched_tokens": 32}, "Raise --max-num-batched-tokens"),
        ({"quantization": "int8"}, "quantization: encoders are served as they are"),
        ({"matryoshka_dimensions": (49,)}, "has 48 numbers"),
    ],
)
def test_settings_that_an_encoder_cannot_keep_are_refused(
    settings: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidSettings, match=message):
        serve_nothing(folder, tmp_path, **settings)


def test_an_input_is_no_longer_than_a_step(folder: Path, tmp_path: Path) -> None:
    with serve(folder, tmp_path / "data", max_num_batched_tokens=32) as small:
        assert small.get("/v1/models").json()["data"][0]["max_model_len"] == 32
        assert small.post("/v1/embeddings", model="base", input=[5] * 32).status_code == 200
        assert small.post("/v1/embeddings", model="base", input=[5] * 33).status_code == 400


def test_a_decoder_of_an_encoders_type_is_a_decoder(tmp_path: Path, tiny_llama_dir: Path) -> None:
    config = BertConfig(**{**CONFIGS["bert"][1], "is_decoder": True})
    BertLMHeadModel(config).save_pretrained(tmp_path / "decoder")
    assert not is_encoder(tmp_path / "decoder")
    assert not is_encoder(tiny_llama_dir)
    assert not is_encoder(tmp_path)


def test_a_layer_that_no_part_uses_is_refused(tmp_path: Path) -> None:
    base = make_encoder("bert", tmp_path / "base", num_hidden_layers=3)
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 2}))
    with pytest.raises(ModelUnusable, match=r"No part of BertModel uses .*encoder\.layer\.2"):
        load_encoder(Settings(device="cpu", dtype="float32"), base)
    (base / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 4}))
    with pytest.raises(ModelUnusable, match=r"lack .*layer\.3"):
        load_encoder(Settings(device="cpu", dtype="float32"), base)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({"pooling_mode_mean_tokens": True}, SentenceSettings("mean", True, 30)),
        ({"pooling_mode_lasttoken": True, "pooling_mode_cls_token": False}, SentenceSettings("last", True, 30)),
        ({"pooling_mode": "cls"}, SentenceSettings("cls", True, 30)),
    ],
)
def test_what_sentence_transformers_saves_is_read(
    said: dict[str, Any], wanted: SentenceSettings, tmp_path: Path
) -> None:
    make_sentence_folder(tmp_path, **said)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 30, "do_lower_case": false}')
    assert sentence_settings(tmp_path) == wanted


@pytest.mark.parametrize("said", [{"pooling_mode_max_tokens": True}, {}, {"pooling_mode": "weightedmean"}])
def test_other_ways_to_pool_are_refused(said: dict[str, Any], tmp_path: Path) -> None:
    make_sentence_folder(tmp_path, **said)
    with pytest.raises(ModelUnusable, match="Served are the first token, the last one, and the mean"):
        sentence_settings(tmp_path)


def test_parts_of_other_kinds_are_refused(tmp_path: Path) -> None:
    modules = [{"idx": 0, "path": "", "type": "sentence_transformers.models.Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelUnusable, match="parts that are not served: Dense"):
        sentence_settings(tmp_path)
    (tmp_path / "modules.json").write_text("{}")
    with pytest.raises(ModelUnusable, match="no list of modules"):
        sentence_settings(tmp_path)
