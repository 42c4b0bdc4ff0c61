"""TGI's and LoRAX's routes: what their fields become, and answers, events and errors in their words."""

from typing import Any

import httpx2
import orjson
import pytest

from manylora import __version__
from manylora.errors import QueueFull
from manylora.tenants.interface import Principal, Role

from .conftest import Rig
from .fakes import BOS


def ask(rig: Rig, route: str = "/generate", inputs: str = "hi", **parameters: Any) -> httpx2.Response:
    body: dict[str, Any] = {"inputs": inputs, "parameters": parameters}
    response: httpx2.Response = rig.client.post(route, json=body)
    return response


def events(response: httpx2.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    return [orjson.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n") if line]


# answers


def test_a_whole_answer(rig: Rig) -> None:
    body = ask(rig, max_new_tokens=9).json()
    assert body["generated_text"] == "The quick"
    assert "details" not in body
    assert body["manylora"]["adapter"] is None


def test_details_have_every_token(rig: Rig) -> None:
    details = ask(rig, max_new_tokens=3, details=True).json()["details"]
    assert details["finish_reason"] == "length"
    assert (details["prompt_tokens"], details["generated_tokens"], details["seed"]) == (3, 3, None)
    assert details["prefill"] == []
    assert details["tokens"] == [
        {"id": ord(text), "text": text, "logprob": -0.5, "special": False} for text in ("T", "h", "e")
    ]


def test_the_prompts_tokens_and_the_likeliest(rig: Rig) -> None:
    details = ask(rig, max_new_tokens=1, decoder_input_details=True, top_n_tokens=2, return_k_alternatives=1).json()[
        "details"
    ]
    assert [(each["id"], each["text"], each["logprob"]) for each in details["prefill"]] == [
        (BOS, "<s>", None),
        (ord("h"), "h", -0.5),
        (ord("i"), "i", -0.5),
    ]
    [token] = details["tokens"]
    assert token["alternative_tokens"] == [{"id": ord("T"), "text": "T", "logprob": -0.5}]
    assert [each["text"] for each in details["top_tokens"][0]] == ["T", "U"]


def test_the_root_answers_with_a_list_or_a_stream(rig: Rig) -> None:
    [answer] = ask(rig, "/", max_new_tokens=3).json()
    assert answer["generated_text"] == "The"
    stream = rig.client.post("/", json={"inputs": "hi", "stream": True, "parameters": {"max_new_tokens": 3}})
    assert [event["token"]["text"] for event in events(stream)] == ["T", "h", "e"]


def test_a_stream_has_an_event_for_each_token(rig: Rig) -> None:
    *first, last = events(ask(rig, "/generate_stream", max_new_tokens=3, details=True, adapter_id="alpha"))
    assert [(event["index"], event["token"]["text"], event["generated_text"]) for event in first] == [
        (1, "a", None),
        (2, "l", None),
    ]
    assert last["generated_text"] == "alp"
    assert last["details"] == {
        "finish_reason": "length",
        "prompt_tokens": 3,
        "input_length": 3,
        "generated_tokens": 3,
        "seed": None,
    }
    assert last["manylora"]["adapter"]["name"] == "alpha"
    assert events(ask(rig, "/generate_stream", max_new_tokens=3))[-1]["details"] is None


def test_the_texts_of_a_streams_tokens_are_the_answer(rig: Rig) -> None:
    """Also where a character takes several tokens, and where special tokens are among them, which say so."""
    rig.engine.ids = (ord("a"), 900, 901, 902, BOS, ord("b"))
    made = events(ask(rig, "/generate_stream", max_new_tokens=6))
    assert [event["token"]["special"] for event in made] == [False, False, False, False, True, False]
    assert made[4]["token"]["text"] == "<s>"
    assert "".join(event["token"]["text"] for event in made if not event["token"]["special"]) == "a你b"
    assert made[-1]["generated_text"] == "a你b"


def test_a_grammars_end_without_a_token_is_told_with_the_last_one(rig: Rig) -> None:
    made = events(ask(rig, "/generate_stream", grammar={"type": "regex", "value": "The"}, max_new_tokens=3))
    assert [event["generated_text"] for event in made] == [None, None, "The"]


def test_the_whole_text_begins_with_the_prompt(rig: Rig) -> None:
    assert ask(rig, return_full_text=True, max_new_tokens=3).json()["generated_text"] == "hiThe"
    made = events(ask(rig, "/generate_stream", return_full_text=True, max_new_tokens=1))
    assert (made[0]["token"]["text"], made[0]["generated_text"]) == ("T", "hiT")


def test_the_best_of_several_is_the_likeliest(rig: Rig) -> None:
    body = ask(rig, best_of=3, do_sample=True, details=True, max_new_tokens=2).json()
    assert body["generated_text"] == "Th"
    assert [each["generated_text"] for each in body["details"]["best_of_sequences"]] == ["Th", "Th"]
    assert isinstance(body["details"]["seed"], int)
    assert rig.last_params.n == 3


def test_why_an_answer_ended(rig: Rig) -> None:
    def reason(**parameters: Any) -> str:
        found: str = ask(rig, details=True, **parameters).json()["details"]["finish_reason"]
        return found

    assert reason(max_new_tokens=2) == "length"
    assert reason() == "eos_token"
    rig.engine.last_stop = "quick"
    assert reason(stop=["quick"]) == "stop_sequence"


# what fields become


REACH: list[tuple[str, Any, str, Any]] = [
    ("max_new_tokens", 7, "max_tokens", 7),
    ("temperature", 0.5, "temperature", 0.5),
    ("temperature", 0, "temperature", 0.0),
    ("top_k", 5, "top_k", 5),
    ("top_p", 0.5, "top_p", 0.5),
    ("typical_p", 0.5, "typical_p", 0.5),
    ("repetition_penalty", 1.3, "repetition_penalty", 1.3),
    ("frequency_penalty", 1.5, "frequency_penalty", 1.5),
    ("presence_penalty", -2, "presence_penalty", -2.0),
    ("stop", ["a", "b"], "stop", ("a", "b")),
    ("ignore_eos_token", True, "ignore_eos", True),
    ("decoder_input_details", True, "prompt_logprobs", 0),
    ("details", True, "logprobs", 0),
]


@pytest.mark.parametrize(("name", "value", "param", "expected"), REACH)
def test_every_field_reaches_the_engine(rig: Rig, name: str, value: Any, param: str, expected: Any) -> None:
    answer = ask(rig, **{name: value})
    assert answer.status_code == 200, answer.text
    assert getattr(rig.last_params, param) == expected


def test_an_answer_may_fill_the_context(rig: Rig) -> None:
    ask(rig)
    assert rig.last_params.max_tokens == rig.engine.context_length - 3


def test_only_the_prompts_last_tokens_are_kept(rig: Rig) -> None:
    ask(rig, inputs="hello", truncate=2)
    assert rig.engine.codec.decode(rig.engine.generations[-1].prompt_ids) == "lo"


def test_stop_strings_are_part_of_the_answer(rig: Rig) -> None:
    ask(rig, stop=["fox"])
    assert rig.last_params.include_stop


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({}, 0.0),
        ({"temperature": 1}, 0.0),
        ({"do_sample": False, "seed": 3}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0}, 0.0),
        ({"temperature": 0.7}, 0.7),
        ({"top_k": 5}, 1.0),
        ({"top_p": 0.9}, 1.0),
        ({"typical_p": 0.9}, 1.0),
    ],
)
def test_an_answer_is_greedy_unless_something_asks_for_chance(
    rig: Rig, parameters: dict[str, Any], temperature: float
) -> None:
    ask(rig, **parameters)
    assert rig.last_params.temperature == temperature


# What the adapter says, what of it holds, and what a request sends that comes before it.
BY_THE_ADAPTER: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"temperature": 0.7}, "temperature", {"temperature": 0.5}),
    ({"top_k": 5}, "top_k", {"top_k": 7}),
    ({"top_p": 0.5}, "top_p", {"top_p": 0.6}),
    ({"repetition_penalty": 1.3}, "repetition_penalty", {"repetition_penalty": 1.0}),
    ({"seed": 3}, "seed", {"seed": 4}),
]


@pytest.mark.parametrize(("said", "param", "own"), BY_THE_ADAPTER, ids=lambda value: None)
def test_what_a_request_leaves_out_is_for_its_adapter_to_say(
    rig: Rig, said: dict[str, Any], param: str, own: dict[str, Any]
) -> None:
    [(name, value)] = said.items()
    rig.directory.defaults["alpha@1"] = orjson.dumps({**said, "locked": [name]}).decode()
    assert ask(rig, adapter_id="alpha").status_code == 200
    assert getattr(rig.last_params, param) == value
    assert ask(rig, adapter_id="alpha", **own).status_code == 400
    rig.directory.defaults["alpha@1"] = orjson.dumps(said).decode()
    assert ask(rig, adapter_id="alpha", **own).status_code == 200
    assert getattr(rig.last_params, param) == next(iter(own.values()))


def test_what_loraxs_client_always_sends_says_nothing(rig: Rig) -> None:
    rig.directory.defaults["alpha@1"] = '{"ignore_eos": true, "stop": ["x"], "locked": ["ignore_eos", "stop"]}'
    sent: dict[str, Any] = {
        "ignore_eos_token": False,
        "do_sample": False,
        "stop": [],
        "watermark": False,
        "details": True,
    }
    assert ask(rig, adapter_id="alpha", **sent, return_full_text=False, temperature=None).status_code == 200
    assert (rig.last_params.ignore_eos, rig.last_params.stop) == (True, ("x",))


def test_the_seed_of_an_adapters_chance_is_told(rig: Rig) -> None:
    rig.directory.defaults["alpha@1"] = orjson.dumps({"temperature": 0.7, "include_stop_str_in_output": False}).decode()
    body = ask(rig, adapter_id="alpha", details=True).json()
    assert body["details"]["seed"] == rig.last_params.seed
    assert not rig.last_params.include_stop


@pytest.mark.parametrize(("seed", "ours"), [(5, 5), (2**63 - 1, 2**63 - 1), (2**63, -(2**63)), (2**64 - 1, -1)])
def test_a_seed_is_an_unsigned_number(rig: Rig, seed: int, ours: int) -> None:
    body = ask(rig, seed=seed, do_sample=True, details=True).json()
    assert rig.last_params.seed == ours
    assert body["details"]["seed"] == seed


@pytest.mark.parametrize("adapter", [None, "", "__base_model__"])
def test_no_adapter_is_the_base(rig: Rig, adapter: str | None) -> None:
    assert ask(rig, adapter_id=adapter).headers["x-manylora-adapter"] == "base"


@pytest.mark.parametrize("name", ["alpha", "alpha@1", "public/alpha", "public/alpha@1"])
def test_an_adapter_is_named_in_every_form(rig: Rig, name: str) -> None:
    assert ask(rig, adapter_id=name).headers["x-manylora-adapter"] == "alpha@1"
    assert ask(rig, adapter_id="owner/name").status_code == 404, "another tenant's, or none"


@pytest.mark.parametrize("source", [None, "local"])
def test_an_adapter_is_named(rig: Rig, source: str | None) -> None:
    assert ask(rig, adapter_id="alpha@2", adapter_source=source).headers["x-manylora-adapter"] == "alpha@2"


SCHEMA = {"type": "object", "properties": {"mark": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("parameters", "kind", "part"),
    [
        ({"grammar": {"type": "json", "value": SCHEMA}}, "json_schema", '"mark"'),
        ({"grammar": {"type": "json", "value": orjson.dumps(SCHEMA).decode()}}, "json_schema", '"mark"'),
        ({"grammar": {"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}}}, "json_schema", '"mark"'),
        ({"grammar": {"type": "regex", "value": "a+"}}, "regex", "a+"),
        ({"schema": SCHEMA}, "json_schema", '"mark"'),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "json_schema", '"mark"'),
        ({"response_format": {"type": "json_object"}}, "json_schema", '"object"'),
    ],
)
def test_an_answer_is_held_to_a_grammar(rig: Rig, parameters: dict[str, Any], kind: str, part: str) -> None:
    answer = ask(rig, **parameters)
    assert answer.status_code == 200, answer.text
    [(_, grammar)] = rig.engine.compiled
    assert grammar.kind == kind
    assert part in grammar.source


# refusals


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"watermark": True}, "parameters.watermark"),
        ({"api_token": "x"}, "parameters.api_token"),
        ({"nonsense": 1}, "parameters.nonsense"),
        ({"adapter_id": "Owner/name"}, "parameters.adapter_id"),
        ({"adapter_id": "owner/name/more"}, "parameters.adapter_id"),
        ({"adapter_id": "/srv/adapters/sql"}, "parameters.adapter_id"),
        ({"adapter_id": "alpha", "adapter_source": "hub"}, "parameters.adapter_source"),
        ({"max_new_tokens": 0}, "parameters.max_new_tokens"),
        ({"temperature": -1}, "parameters.temperature"),
        ({"temperature": 3}, "parameters.temperature"),
        ({"top_p": 0}, "parameters.top_p"),
        ({"top_k": 0}, "parameters.top_k"),
        ({"typical_p": 1.5}, "parameters.typical_p"),
        ({"seed": -1}, "parameters.seed"),
        ({"stop": [""]}, "parameters.stop"),
        ({"stop": "x"}, "parameters.stop"),
        ({"best_of": 2}, "parameters.best_of"),
        ({"best_of": 1000, "do_sample": True}, "parameters.best_of"),
        ({"best_of": 2, "do_sample": True, "seed": 1}, "parameters.seed"),
        ({"top_n_tokens": 21, "details": True}, "parameters.top_n_tokens"),
        ({"return_k_alternatives": 21, "details": True}, "parameters.return_k_alternatives"),
        ({"top_n_tokens": 2}, "parameters.top_n_tokens"),
        ({"return_k_alternatives": 2}, "parameters.return_k_alternatives"),
        ({"response_format": {"type": "text", "schema": SCHEMA}}, "parameters.response_format.schema"),
        ({"truncate": 0}, "parameters.truncate"),
        ({"grammar": {"type": "lark", "value": "x"}}, "parameters.grammar.type"),
        ({"grammar": {"type": "json", "value": "{"}}, "parameters.grammar.value"),
        ({"grammar": {"type": "json_schema", "value": {}}}, "parameters.grammar.value.schema"),
        ({"grammar": {"type": "regex", "value": "a"}, "schema": SCHEMA}, "parameters.schema"),
    ],
)
def test_what_is_not_served_is_refused_by_name(rig: Rig, parameters: dict[str, Any], named: str) -> None:
    answer = ask(rig, **parameters)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error_type"] == "validation"
    assert named in answer.json()["error"]


@pytest.mark.parametrize("route", ["/generate", "/generate_stream", "/"])
@pytest.mark.parametrize("body", [[], {}, {"inputs": ""}, {"inputs": ["a"]}, {"inputs": "a", "model": "alpha"}])
def test_other_bodies_are_refused(rig: Rig, route: str, body: Any) -> None:
    answer = rig.client.post(route, json=body)
    assert (answer.status_code, answer.json()["error_type"]) == (400, "validation")


def test_a_stream_has_neither_best_of_nor_the_prompts_tokens(rig: Rig) -> None:
    for parameters in ({"best_of": 2, "do_sample": True}, {"decoder_input_details": True}):
        assert ask(rig, "/generate_stream", **parameters).status_code == 400
    assert rig.client.post("/generate", json={"inputs": "hi", "stream": True}).status_code == 400


def test_what_a_client_sends_for_nothing_is_taken(rig: Rig) -> None:
    nothing: dict[str, Any] = dict.fromkeys(
        ("adapter_id", "merged_adapters", "api_token", "seed", "grammar", "response_format")
    )
    asked = {**nothing, "watermark": False, "do_sample": False, "stop": [], "best_of": 1, "top_p": 1}
    assert rig.client.post("/generate", json={"inputs": "hi", "parameters": asked}).status_code == 200
    assert rig.client.post("/generate", json={"inputs": "hi", "parameters": None}).status_code == 200


def test_errors_have_their_status_and_a_type_that_the_clients_know(rig: Rig) -> None:
    assert (ask(rig, adapter_id="nobody").status_code) == 404
    assert ask(rig, adapter_id="nobody").json()["error_type"] == "adapter_not_found"
    rig.engine.refuse = QueueFull("The server's queue is full.", retry_after_s=1.5)
    full = ask(rig)
    assert (full.status_code, full.json()["error_type"], full.headers["retry-after"]) == (429, "overloaded", "2")
    rig.engine.refuse = None
    rig.engine.error_at = 2
    assert events(ask(rig, "/generate_stream"))[-1] == {"error": "the engine tripped", "error_type": "generation"}
    rig.engine.error_at = 0
    assert (ask(rig).status_code, ask(rig).json()["error_type"]) == (500, "generation")
    rig.gate.keys["k"] = Principal("acme", Role.USER)
    assert (ask(rig).status_code, ask(rig).json()["error_type"]) == (401, "invalid_api_key")


def test_a_prompt_is_repeated_within_bounds(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manylora.api.tgi.MAX_ECHO_CHARACTERS", 3)
    assert ask(rig, return_full_text=True).status_code == 200
    assert "return_full_text" in ask(rig, return_full_text=True, best_of=2, do_sample=True).json()["error"]


def test_info_says_what_is_served(rig: Rig) -> None:
    body = rig.client.get("/info").json()
    assert (body["model_id"], body["max_total_tokens"], body["version"]) == ("base-model", 256, __version__)


def test_usage_is_counted_as_on_every_other_route(rig: Rig) -> None:
    ask(rig, max_new_tokens=5, adapter_id="alpha")
    [record] = rig.finished
    assert (record.outcome, record.adapter_name, record.prompt_tokens, record.completion_tokens) == (
        "ok",
        "alpha",
        3,
        5,
    )
    assert rig.gate.leases[0].settled == (3, 5)
