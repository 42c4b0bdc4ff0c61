"""`/v1/embeddings` over the fakes: fields, shapes, errors, and what is counted."""

import base64
from typing import Any

import httpx2
import numpy as np
import pytest
from openai.resources.embeddings import Embeddings

from manylora.api import fields
from manylora.api.embeddings import EmbeddingRequest
from manylora.api.schemas import MAX_INPUTS
from manylora.tenants.interface import Principal, Role

from .conftest import Rig
from .fakes import BOS
from .test_fields import parameters_of


def embed(rig: Rig, **body: Any) -> httpx2.Response:
    response: httpx2.Response = rig.client.post("/v1/embeddings", json={"model": "base-model", "input": "hi", **body})
    return response


def unit(*values: float) -> list[float]:
    return [float(value) for value in np.array(values) / np.linalg.norm(values)]


def test_an_embedding_is_a_vector_of_length_one(rig: Rig) -> None:
    answer = embed(rig).json()
    assert answer["object"] == "list"
    assert answer["model"] == "base-model"
    [entry] = answer["data"]
    assert (entry["object"], entry["index"]) == ("embedding", 0)
    assert entry["embedding"] == pytest.approx(unit(3, 2, -3, 0), abs=1e-7)
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "total_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert answer["manylora"]["adapter"] is None


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        ("hi", [(BOS, 104, 105)]),
        (["hi", "a"], [(BOS, 104, 105), (BOS, 97)]),
        ([5, 6], [(5, 6)]),
        ([[5, 6], [7]], [(5, 6), (7,)]),
        (["a"] * MAX_INPUTS, [(BOS, 97)] * MAX_INPUTS),
    ],
)
def test_each_input_becomes_a_vector_in_its_place(rig: Rig, given: Any, ids: list[tuple[int, ...]]) -> None:
    answer = embed(rig, input=given).json()
    assert [g.prompt_ids for g in rig.engine.generations] == ids
    assert [entry["index"] for entry in answer["data"]] == list(range(len(ids)))
    for entry, prompt in zip(answer["data"], ids, strict=True):
        assert entry["embedding"] == pytest.approx(unit(len(prompt), 2, -3, 0), abs=1e-7)


def test_base64_is_the_same_numbers(rig: Rig) -> None:
    plain, packed = (embed(rig, encoding_format=kind).json()["data"][0]["embedding"] for kind in ("float", "base64"))
    assert np.frombuffer(base64.b64decode(packed), "<f4").tolist() == np.array(plain, np.float32).tolist()


@pytest.mark.parametrize(
    ("body", "pooling"), [({}, "last"), ({"pooling": "mean"}, "mean"), ({"pooling": "last"}, "last")]
)
def test_how_tokens_become_one_vector_reaches_the_engine(rig: Rig, body: dict[str, Any], pooling: str) -> None:
    embed(rig, **body)
    params = rig.engine.generations[0].params
    assert (params.pooling, params.max_tokens, params.n) == (pooling, 0, 1)


def test_fields_of_every_route_reach_the_engine(rig: Rig) -> None:
    salt = "s" * 40
    embed(rig, input="hello", truncate_prompt_tokens=2, priority=4, cache_salt=salt, add_special_tokens=False)
    [generation] = rig.engine.generations
    assert (generation.prompt_ids, generation.priority, generation.cache_salt) == ((108, 111), 4, salt)


def test_vectors_are_cut_only_where_the_model_was_trained_for_it(rig: Rig) -> None:
    assert len(embed(rig, dimensions=4).json()["data"][0]["embedding"]) == 4
    refused = embed(rig, dimensions=2)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "dimensions")
    assert "not trained" in refused.json()["error"]["message"]
    rig.engine.dimensions = (2, 3)
    assert embed(rig, dimensions=2).json()["data"][0]["embedding"] == pytest.approx(unit(3, 2), abs=1e-7)
    refused = embed(rig, dimensions=1)
    assert "2, 3 numbers" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[1], []]}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [1000]}, "input"),
        ({"input": 5}, "input"),
        ({"input": None}, "input"),
        ({"input": "x" * 300}, "input"),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, "input"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"pooling": "max"}, "pooling"),
        ({"stream": True}, "stream"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"model": "nobody"}, "model"),
        *(({name: {"a": 1}}, name) for name in fields.EMBEDDING_UNSUPPORTED),
    ],
)
def test_what_is_wrong_is_named(rig: Rig, body: dict[str, Any], param: str) -> None:
    answer = embed(rig, **body)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param
    assert not rig.engine.generations


def test_more_inputs_than_can_be_queued_are_refused(rig: Rig) -> None:
    rig.engine.max_choices = 3
    answer = embed(rig, input=["a"] * 4)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")


def test_a_base_without_hidden_states_says_so(rig: Rig) -> None:
    rig.engine.hidden_size = 0
    answer = embed(rig)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")


@pytest.mark.parametrize("name", sorted(parameters_of(Embeddings.create)))
def test_every_field_of_the_openai_client_is_known_and_may_be_null(rig: Rig, name: str) -> None:
    assert name in EmbeddingRequest.model_fields or name in EmbeddingRequest.unsupported
    if name != "input":
        assert embed(rig, **{name: None}).status_code == 200


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, values in fields.EMBEDDING_UNSUPPORTED.items() for v in (None, *values)]
)
def test_a_neutral_value_counts_as_absent(rig: Rig, name: str, value: Any) -> None:
    assert embed(rig, **{name: value}).status_code == 200


def test_quota_usage_metrics_and_the_log_line_are_those_of_a_request(rig: Rig) -> None:
    answer = embed(rig, model="alpha", input=["hi", "hello"], user="me")
    assert answer.headers["x-manylora-adapter"] == "alpha@1"
    [lease] = rig.gate.leases
    assert (lease.admitted, lease.settled) == ((9, 0), (9, 0))
    [record] = rig.finished
    assert (record.outcome, record.prompt_tokens, record.completion_tokens) == ("ok", 9, 0)
    assert 'manylora_prompt_tokens_total{adapter="alpha",tenant="public"} 9.0' in rig.client.get("/metrics").text
    rig.gate.is_used_up = True
    assert embed(rig).status_code == 429


def test_a_key_is_asked_for_and_shows_its_tenants_adapters(rig: Rig) -> None:
    rig.gate.keys = {"k": Principal("acme", Role.USER), "r": Principal("rival", Role.USER)}
    body = {"model": "beta", "input": "hi"}
    statuses = [
        rig.client.post("/v1/embeddings", json=body, headers=headers).status_code
        for headers in ({}, {"authorization": "Bearer k"}, {"authorization": "Bearer r"})
    ]
    assert statuses == [401, 200, 404]


def test_an_error_of_the_engine_is_the_answer(rig: Rig) -> None:
    rig.engine.is_draining = True
    assert embed(rig).status_code == 503
