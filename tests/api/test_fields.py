"""Every field that is accepted reaches the engine; every other is refused by name."""

import dataclasses
import inspect
import typing
from typing import Any

import pytest
from openai.resources.chat.completions import Completions as ChatCompletions
from openai.resources.completions import Completions
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionUserMessageParam,
)

from manylora.api import fields, schemas
from manylora.api.schemas import MAX_CACHE_SALT_LENGTH, MIN_CACHE_SALT_LENGTH
from manylora.engine.interface import SamplingParams

from .conftest import Rig
from .fakes import VOCAB_SIZE

REACH: list[tuple[str, Any, str, Any]] = [
    ("max_tokens", 7, "max_tokens", 7),
    ("max_completion_tokens", 7, "max_tokens", 7),
    ("temperature", 0, "temperature", 0.0),
    ("temperature", 2, "temperature", 2.0),
    ("top_p", 0.5, "top_p", 0.5),
    ("top_k", 5, "top_k", 5),
    ("top_k", -1, "top_k", 0),
    ("top_k", VOCAB_SIZE, "top_k", 0),
    ("min_p", 0.1, "min_p", 0.1),
    ("typical_p", 0.2, "typical_p", 0.2),
    ("seed", -(2**63), "seed", -(2**63)),
    ("seed", 2**63 - 1, "seed", 2**63 - 1),
    ("stop", "x", "stop", ("x",)),
    ("stop", ["a", "b", "c", "d", "e"], "stop", ("a", "b", "c", "d", "e")),
    ("stop_token_ids", [3, 999], "stop_token_ids", (3, 999)),
    ("ignore_eos", True, "ignore_eos", True),
    ("presence_penalty", -2, "presence_penalty", -2.0),
    ("frequency_penalty", 1.5, "frequency_penalty", 1.5),
    ("repetition_penalty", 1.3, "repetition_penalty", 1.3),
    ("logit_bias", {"5": -100, "999": 1.5}, "logit_bias", ((5, -100.0), (999, 1.5))),
    ("n", 3, "n", 3),
    ("n", 2.0, "n", 2),
    ("allowed_token_ids", [3, 999], "allowed_token_ids", (3, 999)),
    ("bad_words", ["no"], "bad_words", ((110, 111),)),
    ("min_tokens", 3, "min_tokens", 3),
    ("skip_special_tokens", False, "skip_special_tokens", False),
    ("include_stop_str_in_output", True, "include_stop", True),
    ("prompt_logprobs", 2, "prompt_logprobs", 2),
    ("prompt_logprobs", 0, "prompt_ranks", True),
]


@pytest.fixture
def rig(shared_rig: Rig) -> Rig:
    """The shared application, whose engine was asked for nothing yet."""
    shared_rig.engine.generations.clear()
    return shared_rig


@pytest.mark.parametrize("route", ["complete", "chat"])
@pytest.mark.parametrize(("name", "value", "param", "expected"), REACH)
def test_every_sampling_field_reaches_the_engine(
    rig: Rig, route: str, name: str, value: Any, param: str, expected: Any
) -> None:
    answer = getattr(rig, route)(**{name: value})
    assert answer.status_code == 200, answer.text
    assert getattr(rig.engine.generations[0].params, param) == expected


def test_every_sampling_param_is_covered_here() -> None:
    elsewhere = {"logprobs", "grammar", "pooling", "reads_head", "second_from", "speech"}  # their own tests
    assert {field.name for field in dataclasses.fields(SamplingParams)} == {r[2] for r in REACH} | elsewhere


@pytest.mark.parametrize(
    ("body", "logprobs", "prompt_logprobs"),
    [({}, None, None), ({"logprobs": 0}, 0, None), ({"logprobs": 5}, 5, None), ({"logprobs": 2, "echo": True}, 2, 2)],
)
def test_completions_logprobs_reach_the_engine(
    rig: Rig, body: dict[str, Any], logprobs: int | None, prompt_logprobs: int | None
) -> None:
    assert rig.complete(**body).status_code == 200
    params = rig.engine.generations[0].params
    assert (params.logprobs, params.prompt_logprobs) == (logprobs, prompt_logprobs)


@pytest.mark.parametrize(
    ("body", "logprobs"),
    [({}, None), ({"logprobs": False}, None), ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 20}, 20)],
)
def test_chat_logprobs_reach_the_engine(rig: Rig, body: dict[str, Any], logprobs: int | None) -> None:
    assert rig.chat(**body).status_code == 200
    assert rig.engine.generations[0].params.logprobs == logprobs


def test_defaults_are_openais(rig: Rig) -> None:
    rig.complete()
    assert rig.engine.generations[0].params == SamplingParams(max_tokens=16)


def test_chat_may_use_the_rest_of_the_context(rig: Rig) -> None:
    rig.chat()
    generation = rig.engine.generations[0]
    assert generation.params.max_tokens == rig.engine.context_length - len(generation.prompt_ids)


def test_null_is_the_default_for_every_field(rig: Rig) -> None:
    for name, *_ in REACH:
        assert rig.complete(**{name: None}).status_code == 200
    assert {g.params for g in rig.engine.generations} == {SamplingParams(max_tokens=16)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("max_completion_tokens", 0),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "1"),
        ("temperature", 1e300),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("min_p", 1.1),
        ("min_p", -0.1),
        ("typical_p", 0),
        ("typical_p", 1.1),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("seed", 0.5),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop", ["a"] * 33),
        ("stop", "a" * 1025),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [VOCAB_SIZE]),
        ("stop_token_ids", 5),
        ("ignore_eos", "yes"),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("logit_bias", {str(VOCAB_SIZE): 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"5": 1, "005": 1}),
        ("logit_bias", {"²": 1}),
        ("logit_bias", {"1" * 5000: 1}),
        ("logit_bias", [1]),
        ("n", 0),
        ("n", 129),
        ("n", 10**30),
        ("allowed_token_ids", [VOCAB_SIZE]),
        ("allowed_token_ids", [-1]),
        ("allowed_token_ids", [0] * (schemas.MAX_ALLOWED_TOKENS + 1)),
        ("bad_words", [" "]),
        ("bad_words", "no"),
        ("bad_words", ["a"] * (schemas.MAX_BAD_WORDS + 1)),
        ("bad_words", ["a" * (schemas.MAX_BAD_WORD_LENGTH + 1)]),
        ("min_tokens", -1),
        ("min_tokens", True),
        ("min_tokens", 1.5),
        ("skip_special_tokens", "no"),
        ("include_stop_str_in_output", 1),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", -2),
        ("add_special_tokens", "no"),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 21),
        ("return_token_ids", 1),
        ("return_tokens_as_token_ids", "yes"),
        ("priority", 0.5),
        ("priority", 2**63),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("model", 5),
        ("adapter_id", 5),
        ("user", 5),
        ("metadata", {"a": 1}),
    ],
)
@pytest.mark.parametrize("route", ["complete", "chat"])
def test_a_value_out_of_range_is_refused_by_name(rig: Rig, route: str, name: str, value: Any) -> None:
    answer = getattr(rig, route)(**{name: value})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert str(error["param"]).startswith(name)
    assert name in error["message"]
    assert not rig.engine.generations


def test_the_other_routes_own_field_is_shown_the_way(rig: Rig) -> None:
    for answer, path in (
        (rig.complete(messages=[]), "/v1/chat/completions"),
        (rig.chat(prompt="hi"), "/v1/completions"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_field")
        assert f"Send it to {path}." in answer.json()["error"]["message"]


def test_no_tokens_at_all_can_be_asked_for_of_completions_only(rig: Rig) -> None:
    assert rig.complete(max_tokens=0).status_code == 200
    assert rig.engine.generations[0].params.max_tokens == 0
    refused = rig.chat(max_tokens=0)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")


def test_more_answers_than_can_ever_be_queued_are_refused_at_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.engine, "max_choices", 10)
    assert rig.complete(prompt=["a", "b"], n=5).status_code == 200
    for body, param in (({"prompt": ["a", "b"], "n": 6}, "n"), ({"prompt": ["a"] * 11}, "prompt")):
        answer = rig.complete(**body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("value", [-1, 21, True, "1"])
def test_completions_logprobs_out_of_range_are_refused(rig: Rig, value: Any) -> None:
    answer = rig.complete(logprobs=value)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logprobs")


@pytest.mark.parametrize("body", [{"top_logprobs": 2}, {"logprobs": True, "top_logprobs": 21}])
def test_chat_top_logprobs_out_of_place_are_refused(rig: Rig, body: dict[str, Any]) -> None:
    answer = rig.chat(**body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "top_logprobs")


ROUTE_FIELDS = [
    *(("complete", name) for name in sorted(fields.COMPLETION_UNSUPPORTED)),
    *(("chat", name) for name in sorted(fields.CHAT_UNSUPPORTED)),
]


@pytest.mark.parametrize(("route", "name"), ROUTE_FIELDS)
def test_every_unsupported_field_is_refused_by_name(rig: Rig, route: str, name: str) -> None:
    answer = getattr(rig, route)(**{name: {"a": 1}})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "unsupported_field"
    assert answer.json()["error"]["param"] == name


NEUTRAL = [
    *(("complete", name, value) for name, values in fields.COMPLETION_UNSUPPORTED.items() for value in (None, *values)),
    *(("chat", name, value) for name, values in fields.CHAT_UNSUPPORTED.items() for value in (None, *values)),
]


@pytest.mark.parametrize(("route", "name", "neutral"), NEUTRAL, ids=repr)
def test_a_neutral_value_counts_as_absent(rig: Rig, route: str, name: str, neutral: Any) -> None:
    assert getattr(rig, route)(**{name: neutral}).status_code == 200


@pytest.mark.parametrize(
    ("route", "name", "value"),
    [
        ("chat", "parallel_tool_calls", True),
        ("chat", "tool_choice", "auto"),
        ("chat", "tool_choice", "none"),
        ("chat", "modalities", ["text"]),
        ("chat", "service_tier", "default"),
        ("complete", "min_tokens", 0),
        ("complete", "skip_special_tokens", True),
        ("complete", "priority", 0),
        ("complete", "min_tokens", False),
        ("complete", "allowed_token_ids", {}),
        ("complete", "bad_words", []),
        ("complete", "prompt_logprobs", False),
        ("complete", "truncate_prompt_tokens", ""),
        ("chat", "priority", []),
        ("complete", "length_penalty", 1.0),
        ("chat", "response_format", {"type": "text", "json_schema": None}),
        ("chat", "stream_options", {"include_usage": False}),
        ("chat", "stream_options", {"include_obfuscation": None, "made_up": None}),
        ("chat", "metadata", {"a": None}),
        ("chat", "logit_bias", {"5": None}),
    ],
)
def test_a_field_spelled_out_at_its_default_counts_as_absent(rig: Rig, route: str, name: str, value: Any) -> None:
    answer = getattr(rig, route)(**{name: value, **({"tools": []} if route == "chat" else {})})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("length_penalty", True),
        ("spaces_between_special_tokens", False),
        ("service_tier", "flex"),
        ("modalities", ["text", "audio"]),
        ("parallel_tool_calls", "yes"),
        ("verbosity", "low"),
    ],
)
def test_a_value_that_asks_for_something_is_refused(rig: Rig, name: str, value: Any) -> None:
    answer = rig.chat(**{name: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tool_choice": "auto", "tools": [TOOL]}, "tools"),
        ({"tool_choice": {"type": "function"}, "parallel_tool_calls": False, "tools": [TOOL]}, "tool_choice"),
        ({"function_call": "auto", "functions": [{"name": "f"}]}, "functions"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_the_error_names_the_field_that_matters_and_says_why(rig: Rig, body: dict[str, Any], param: str) -> None:
    answer = rig.chat(**body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert "tool" in answer.json()["error"]["message"]


def test_best_of_equal_to_n_counts_as_absent(rig: Rig) -> None:
    assert rig.complete(best_of=1).status_code == 200
    assert rig.complete(best_of=2, n=2).status_code == 200
    assert rig.complete(best_of=2).json()["error"]["param"] == "best_of"


@pytest.mark.parametrize("route", ["complete", "chat"])
@pytest.mark.parametrize("value", [1, False, "", [], {}])
def test_an_unknown_field_is_refused_whatever_its_value(rig: Rig, route: str, value: Any) -> None:
    answer = getattr(rig, route)(temprature=value)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "temprature"


@pytest.mark.parametrize("route", ["complete", "chat"])
def test_null_of_any_field_counts_as_absent(rig: Rig, route: str) -> None:
    assert getattr(rig, route)(temprature=None).status_code == 200
    message = {"role": "user", "content": "hi", "made_up": None, "name": None}
    assert rig.chat(messages=[message]).status_code == 200
    part = {"type": "text", "text": "hi", "made_up": None}
    assert rig.chat(messages=[{"role": "user", "content": [part]}]).status_code == 200


def parameters_of(method: Any) -> set[str]:
    """The fields of a body that a method of the openai client takes."""
    return set(inspect.signature(method).parameters) - {
        "self", "model", "messages", "prompt", "extra_headers", "extra_query", "extra_body", "timeout"
    }  # fmt: skip


CLIENT_FIELDS = [
    *(("complete", schemas.CompletionRequest, n) for n in sorted(parameters_of(Completions.create))),
    *(("chat", schemas.ChatRequest, n) for n in sorted(parameters_of(ChatCompletions.create))),
]


@pytest.mark.parametrize(("route", "schema", "name"), CLIENT_FIELDS)
def test_every_field_of_the_openai_client_is_known_and_may_be_null(
    rig: Rig, route: str, schema: type[schemas.GenerationRequest], name: str
) -> None:
    assert name in schema.model_fields or name in schema.unsupported, "a new field: serve it or list it in api/fields"
    assert getattr(rig, route)(**{name: None}).status_code == 200


def test_the_whole_signature_of_the_openai_client_may_be_null_at_once(rig: Rig) -> None:
    assert rig.complete(**dict.fromkeys(parameters_of(Completions.create))).status_code == 200
    assert rig.chat(**dict.fromkeys(parameters_of(ChatCompletions.create))).status_code == 200


@pytest.mark.parametrize(
    ("kind", "role"),
    [
        (ChatCompletionAssistantMessageParam, "assistant"),
        (ChatCompletionUserMessageParam, "user"),
        (ChatCompletionSystemMessageParam, "system"),
        (ChatCompletionDeveloperMessageParam, "developer"),
    ],
)
def test_every_field_of_the_openai_clients_messages_is_known(rig: Rig, kind: Any, role: str) -> None:
    names = set(typing.get_type_hints(kind))
    assert names <= set(schemas.Message.model_fields) | set(fields.MESSAGE_UNSUPPORTED)
    message = {**dict.fromkeys(names), "role": role, "content": "hi"}
    assert rig.chat(messages=[message, {"role": "user", "content": "hi"}]).status_code == 200


@pytest.mark.parametrize(("name", "value"), [("store", True), ("service_tier", "flex")])
def test_only_one_value_of_store_and_service_tier_is_taken(rig: Rig, name: str, value: Any) -> None:
    answer = rig.complete(**{name: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls[0].function"),
        ({"role": "user", "content": "a", "audio": {"id": "1"}}, "messages[0].audio"),
        ({"role": "user", "content": "a", "weight": 1}, "messages[0].weight"),
        ({"role": "robot", "content": "a"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": []}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "cache": 1}]}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ("hi", "messages[0]"),
    ],
)
def test_a_message_of_another_shape_is_refused_by_its_place(rig: Rig, message: Any, param: str) -> None:
    answer = rig.chat(messages=[message])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("messages", [[], "hi", None, {}])
def test_messages_must_be_a_list_with_one_message(rig: Rig, messages: Any) -> None:
    assert rig.chat(messages=messages).json()["error"]["param"] == "messages"


@pytest.mark.parametrize("route", ["complete", "chat"])
def test_the_salt_reaches_the_engine_with_every_prompt_and_no_log_line(
    rig: Rig, route: str, caplog: pytest.LogCaptureFixture
) -> None:
    salt = "s" * MIN_CACHE_SALT_LENGTH
    prompts = {"prompt": ["one", "two"]} if route == "complete" else {}
    assert getattr(rig, route)(cache_salt=salt, **prompts).status_code == 200
    assert {generation.cache_salt for generation in rig.engine.generations} == {salt}
    assert len(rig.engine.generations) == (2 if prompts else 1)
    assert salt not in caplog.text


@pytest.mark.parametrize("length", [0, 1, MIN_CACHE_SALT_LENGTH - 1, MAX_CACHE_SALT_LENGTH + 1])
def test_a_salt_that_could_be_guessed_is_refused(rig: Rig, length: int) -> None:
    salt = "s" * length
    answer = rig.complete(cache_salt=salt)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "cache_salt")
    assert "random" in error["message"]
    assert length < 2 or salt not in error["message"]
    assert rig.engine.generations == []


SENT_BACK = {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (
            {**SENT_BACK, "parsed": None, "refusal": None, "audio": None, "function_call": None, "tool_calls": None},
            "yes",
        ),
        ({**SENT_BACK, "tool_calls": [], "annotations": [], "refusal": "", "reasoning_content": ""}, "yes"),
        ({"role": "assistant", "content": None}, ""),
        ({"role": "assistant"}, ""),
        ({"role": "assistant", "content": None, "refusal": "I cannot."}, "I cannot."),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot."}]}, "I cannot."),
        ({"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]}, "ab"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]}, "a"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "prompt_cache_breakpoint": {}}]}, "a"),
        ({"role": "user", "content": "a", "cache_control": {"type": "ephemeral"}}, "a"),
    ],
)
def test_what_clients_send_back_is_taken(rig: Rig, message: dict[str, Any], text: str) -> None:
    answer = rig.chat(messages=[{"role": "user", "content": "hi"}, message, {"role": "user", "content": "more"}])
    assert answer.status_code == 200, answer.text
    prompt = rig.engine.codec.decode(rig.engine.generations[0].prompt_ids)
    assert prompt == f"[user]hi[{message['role']}]{text}[user]more[assistant]"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user", "content": None}, "is null"),
        ({"role": "user"}, "is required"),
        ({"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}, "type 'refusal'"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}, "part 1 of the type"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "'text' is no string"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "cash": 1}]}, "field 'cash'"),
        ({"role": "user", "content": ["a"]}, "no object"),
        ({"role": "assistant", "content": "yes", "refusal": "no"}, "one of the two"),
        ({"role": "user", "content": "a", "refusal": "no"}, "assistant"),
        ({"role": "assistant", "content": "a", "parsed": {"a": 1}}, "'messages[0].parsed'"),
    ],
)
def test_what_stays_refused_says_what_is_wrong_with_it(rig: Rig, message: dict[str, Any], words: str) -> None:
    answer = rig.chat(messages=[message])
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
