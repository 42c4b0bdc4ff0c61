"""The five ways to name an adapter, and that one cannot learn of another tenant's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.api.naming import adapter_of
from manylora.api.schemas import CompletionRequest
from manylora.engine.interface import AdapterRef
from manylora.errors import AdapterNotFound, InvalidRequest
from manylora.tenants.interface import Principal, Role

from .conftest import Rig
from .fakes import FakeDirectory, make_ref

BASE = "org/base:model"


def named(model: str | None = None, adapter_id: str | None = None, tenant: str = "acme") -> AdapterRef | None:
    body = CompletionRequest(model=model, adapter_id=adapter_id, prompt="hi")
    return adapter_of(body, FakeDirectory(), tenant, BASE, {})


@pytest.mark.parametrize(
    ("model", "adapter_id", "expected"),
    [
        (BASE, None, None),
        (None, None, None),
        ("alpha", None, make_ref("alpha", 1)),
        ("alpha@2", None, make_ref("alpha", 2)),
        (f"{BASE}:alpha", None, make_ref("alpha", 1)),
        (f"{BASE}:alpha@2", None, make_ref("alpha", 2)),
        (BASE, "alpha", make_ref("alpha", 1)),
        (None, "alpha@2", make_ref("alpha", 2)),
        ("alpha", "alpha@1", make_ref("alpha", 1)),
        (f"{BASE}:alpha@1", "alpha", make_ref("alpha", 1)),
        ("beta", None, make_ref("beta", 1, "acme")),
        ("acme/beta@1", None, make_ref("beta", 1, "acme")),
        (f"{BASE}:acme/beta", "beta", make_ref("beta", 1, "acme")),
        ("public/alpha@2", None, make_ref("alpha", 2)),
        ("alpha", "public/alpha", make_ref("alpha", 1)),
    ],
)
def test_every_form_names_the_same_adapter(
    model: str | None, adapter_id: str | None, expected: AdapterRef | None
) -> None:
    assert named(model, adapter_id) == expected


@pytest.mark.parametrize(
    ("model", "adapter_id"), [("alpha", "beta"), ("alpha@1", "alpha@2"), ("alpha", "alpha@2"), ("gone", "alpha")]
)
def test_two_fields_that_name_different_adapters_are_refused(model: str, adapter_id: str) -> None:
    with pytest.raises(InvalidRequest, match="different adapters") as caught:
        named(model, adapter_id)
    assert not isinstance(caught.value, AdapterNotFound)
    assert caught.value.param == "adapter_id"


@pytest.mark.parametrize(
    "model",
    [
        "gone",
        "alpha@3",
        "alpha@0",
        "alpha@01",
        "alpha@-1",
        "alpha@x",
        "alpha@",
        "Alpha",
        "",
        "other:alpha",
        f"{BASE}:",
        f"{BASE}:{BASE}",
        "../alpha",
        "alpha@" + "9" * 400,
        "a" * 5000,
        "alpha\n",
        "acme/alpha",
        "public/beta",
        "rival/beta",
        "acme/",
        "/beta",
        "acme/acme/beta",
        "älpha",
    ],
)
def test_any_other_name_is_not_found(model: str) -> None:
    with pytest.raises(AdapterNotFound) as caught:
        named(model)
    assert caught.value.param == "model"
    assert len(caught.value.message) < 500


def test_missing_and_foreign_adapters_have_byte_identical_answers(rig: Rig) -> None:
    rig.gate.keys["k"] = Principal("rival", Role.USER)
    rig.client.headers["authorization"] = "Bearer k"
    foreign = rig.complete(model="beta")
    rig.directory.refs = ()
    missing = rig.complete(model="beta")
    assert foreign.status_code == missing.status_code == 404
    assert foreign.content == missing.content
    assert foreign.json()["error"]["code"] == "adapter_not_found"
    assert foreign.json()["error"]["type"] == "not_found_error"


@given(st.text(max_size=80))
def test_no_text_makes_the_parser_fail_otherwise(text: str) -> None:
    for model, adapter_id in ((text, None), (None, text), (f"{BASE}:{text}", None)):
        try:
            ref = named(model, adapter_id)
        except AdapterNotFound:
            continue
        assert ref is None or ref.name in text


def test_header_and_body_say_who_answered(rig: Rig) -> None:
    answer = rig.complete(model="alpha@2")
    assert answer.headers["x-manylora-adapter"] == "alpha@2"
    ref = make_ref("alpha", 2)
    assert answer.json()["manylora"] == {
        "adapter": {"name": "alpha", "version": 2, "digest": ref.digest},
        "queue_ms": 1.5,
        "load_ms": 2.5,
        "load_tier": "host",
        "ttft_ms": 12.25,
    }
    assert rig.engine.generations[0].adapter == ref


def test_base_answers_under_its_own_name(rig: Rig) -> None:
    answer = rig.complete()
    assert answer.headers["x-manylora-adapter"] == "base"
    assert answer.json()["manylora"]["adapter"] is None
    assert rig.engine.generations[0].adapter is None


def test_adapter_id_null_stands_for_the_base_even_without_model(rig: Rig) -> None:
    assert rig.complete(model=None, adapter_id=None).status_code == 200


def test_a_request_without_model_is_refused(rig: Rig) -> None:
    answer = rig.client.post("/v1/completions", json={"prompt": "hi"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "model"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("by", ["model", "adapter_id"])
def test_one_that_was_deleted_elsewhere_meanwhile_is_answered_as_one_that_never_was(
    rig: Rig, by: str, stream: bool
) -> None:
    def ask(name: str) -> tuple[int, str]:
        answer = rig.client.post("/v1/completions", json={by: name, "prompt": "hi", "max_tokens": 2, "stream": stream})
        return answer.status_code, answer.text.replace(name, "NAME")

    never_there = ask("nothing")
    assert never_there[0] == 404
    rig.engine.error_at, rig.engine.error = 0, AdapterNotFound("deleted on another server")
    assert ask("alpha") == never_there
