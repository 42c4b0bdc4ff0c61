"""Requests that name several adapters, each with a weight."""

from typing import Any

import pytest

from manylora.engine.interface import Mix
from manylora.tenants.interface import Principal, Role

from .conftest import Rig
from .fakes import make_ref

ALPHA, BETA = make_ref("alpha"), make_ref("beta", 1, "acme")
BOTH = Mix.weighted([(ALPHA, 0.7), (BETA, -0.5)])
ADAPTERS = [{"name": "alpha", "weight": 0.7}, {"name": "beta@1", "weight": -0.5}]


@pytest.fixture
def acme(rig: Rig) -> Rig:
    """The client is the tenant `acme`'s."""
    rig.gate.keys["k"] = Principal("acme", Role.USER)
    rig.client.headers["authorization"] = "Bearer k"
    return rig


def post(rig: Rig, route: str, **body: Any) -> Any:
    given: dict[str, dict[str, Any]] = {"/v1/completions": {"prompt": "hi"}, "/v1/embeddings": {"input": "hi"},
             "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
             "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9},
             "/v1/responses": {"input": "hi"}}  # fmt: skip
    return rig.client.post(route, json={**given[route], **body})


def ran(rig: Rig) -> Any:
    """What the last request had run with."""
    return rig.engine.generations[-1].adapter


def refused(rig: Rig, param: str, words: str, *, status: int = 400, **body: Any) -> None:
    answer = post(rig, "/v1/completions", **body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "route", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/messages", "/v1/responses"]
)
@pytest.mark.parametrize(
    "fields",
    [
        {"adapters": ADAPTERS},
        {"adapters": ADAPTERS[::-1], "model": "base-model"},
        {"lora": [{"id": "alpha", "scale": 0.7}, {"id": "beta", "scale": -0.5}], "adapter_id": None},
    ],
)
def test_a_mix_runs_with_its_weights_and_is_named_in_the_answer(acme: Rig, route: str, fields: dict[str, Any]) -> None:
    answer = post(acme, route, **fields)
    assert answer.status_code == 200, answer.text
    assert ran(acme) == BOTH
    assert answer.headers["x-manylora-adapter"] == "beta@1*-0.5+alpha@1*0.7"
    assert answer.json()["model"] == fields.get("model", "alpha+beta")
    said = answer.json()["manylora"]
    assert said["adapter"] is None
    assert said["adapters"] == [
        {"name": "beta", "version": 1, "digest": BETA.digest, "weight": -0.5},
        {"name": "alpha", "version": 1, "digest": ALPHA.digest, "weight": 0.7},
    ]


def test_a_mix_is_counted_as_one_thing_whatever_its_weights(acme: Rig) -> None:
    for weight in (0.5, 0.25):
        mix = [{"name": "alpha", "weight": weight}, {"name": "beta"}]
        assert post(acme, "/v1/completions", adapters=mix).is_success
    records = acme.finished
    assert [record.adapter_name for record in records] == ["alpha+beta", "alpha+beta"]
    assert len({record.adapter for record in records}) == 1
    assert records[0].adapter is not None
    assert (records[0].adapter.tenant, records[0].adapter.label) == ("acme", "alpha+beta")
    assert b'adapter="alpha+beta"' in acme.metrics.render()


def test_one_adapter_with_weight_one_is_that_adapter_and_with_weight_nought_none(acme: Rig) -> None:
    assert post(acme, "/v1/completions", adapters=[{"name": "beta"}]).headers["x-manylora-adapter"] == "beta@1"
    assert ran(acme) == BETA
    answer = post(acme, "/v1/completions", lora=[{"id": "beta", "scale": 0.0}])
    assert answer.headers["x-manylora-adapter"] == "base"
    assert ran(acme) is None


def test_weights_and_numbers_have_bounds(acme: Rig) -> None:
    for weight in (4.01, -5, 1e300):
        refused(acme, "adapters[0].weight", "4", adapters=[{"name": "alpha", "weight": weight}])
    refused(acme, "lora[0].scale", "4", lora=[{"id": "alpha", "scale": -4.5}])
    refused(acme, "adapters[0].weight", "number", adapters=[{"name": "alpha", "weight": "1"}])
    refused(acme, "adapters", "8", adapters=[{"name": "alpha"}] * 9)
    refused(acme, "adapters[0].nme", "nme", adapters=[{"nme": "alpha"}])
    assert not acme.engine.generations


def test_what_names_adapters_twice_is_refused(acme: Rig) -> None:
    refused(acme, "adapters", "'model'", model="alpha", adapters=ADAPTERS)
    refused(acme, "adapters", "'adapter_id'", adapter_id="alpha", adapters=ADAPTERS)
    refused(acme, "lora", "Send one", lora=[{"id": "alpha"}], adapters=ADAPTERS)
    refused(acme, "adapters[1].name", "more than once", adapters=[{"name": "alpha"}, {"name": "alpha@1"}])
    refused(acme, "lora[0].id", "have names here", lora=[{"id": 0, "scale": 0.5}])


def test_every_part_must_be_the_callers_own_or_public(rig: Rig) -> None:
    """Missing and foreign are one and the same."""
    rig.gate.keys["k"] = Principal("rival", Role.USER)
    rig.client.headers["authorization"] = "Bearer k"
    foreign = post(rig, "/v1/completions", adapters=[{"name": "alpha"}, {"name": "beta"}])
    rig.directory.refs = (ALPHA,)
    missing = post(rig, "/v1/completions", adapters=[{"name": "alpha"}, {"name": "beta"}])
    assert foreign.status_code == missing.status_code == 404
    assert foreign.content == missing.content
    assert foreign.json()["error"]["param"] == "adapters[1].name"
    assert not rig.engine.generations


def test_nothing_named_is_the_base_and_a_body_needs_something(rig: Rig) -> None:
    assert post(rig, "/v1/completions", model="alpha", adapters=[], lora=[]).headers["x-manylora-adapter"] == "alpha@1"
    assert post(rig, "/v1/completions", adapters=None, adapter_id=None).headers["x-manylora-adapter"] == "base"
    refused(rig, "model", "required")


def test_a_mix_has_no_defaults_and_nothing_that_is_locked_is_mixed(acme: Rig) -> None:
    acme.directory.defaults["alpha@1"] = '{"seed":7}'
    assert post(acme, "/v1/completions", adapters=ADAPTERS).is_success
    assert acme.engine.generations[-1].params.seed is None
    acme.directory.defaults["alpha@1"] = '{"locked":["seed"],"seed":7}'
    refused(acme, "adapters", "alpha@1 has fields locked", adapters=ADAPTERS)
    assert post(acme, "/v1/completions", adapters=[{"name": "alpha"}]).is_success


def generate(rig: Rig, **merged: Any) -> Any:
    return rig.client.post("/generate", json={"inputs": "hi", "parameters": {"merged_adapters": merged}})


def test_lorax_merges_linearly(acme: Rig) -> None:
    answer = generate(acme, ids=["alpha", "beta"], weights=[0.7, -0.5], merge_strategy="linear")
    assert answer.status_code == 200, answer.text
    assert ran(acme) == BOTH
    assert generate(acme, ids=["beta"], weights=[1.0]).is_success
    assert ran(acme) == BETA


@pytest.mark.parametrize(
    ("merged", "words"),
    [
        ({"ids": ["alpha"], "weights": [0.5, 0.5]}, "1 ids and 2 weights"),
        ({"ids": ["alpha"], "weights": [9]}, "from -4 to 4"),
        ({"ids": ["alpha"], "weights": [1], "merge_strategy": "ties", "density": 0.5}, "add_weighted_adapter"),
        ({"ids": ["alpha"], "weights": [1], "merge_strategy": "magic"}, "merge_strategy"),
        ({"ids": ["alpha"], "weights": [1], "density": 0.5}, "'parameters.merged_adapters.density' means nothing"),
        ({"ids": ["gone"], "weights": [1]}, "'gone' does not exist"),
        ({"ids": [], "weights": []}, "ids"),
    ],
)
def test_what_is_no_weighted_sum_is_refused_with_the_way_out(acme: Rig, merged: dict[str, Any], words: str) -> None:
    answer = generate(acme, **merged)
    assert answer.status_code in (400, 404), answer.text
    assert words in answer.json()["error"]
    assert not acme.engine.generations
