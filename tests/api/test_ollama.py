"""Ollama's routes: what its fields become, and answers and errors in its words."""

from typing import Any

import httpx2
import orjson
import pytest

from manylora import __version__
from manylora.tenants.interface import Principal, Role

from .conftest import Rig
from .test_tools import CALL, PARAMETERS, THINKING

MESSAGES = [{"role": "user", "content": "hi"}]


def ask(rig: Rig, route: str = "chat", **body: Any) -> httpx2.Response:
    what = {"messages": MESSAGES} if route == "chat" else {"prompt": "hi"}
    sent = {"model": "base-model", "stream": False, **what, **body}
    response: httpx2.Response = rig.client.post(f"/api/{route}", json=sent)
    return response


def lines(response: httpx2.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("application/x-ndjson")
    return [orjson.loads(line) for line in response.text.splitlines()]


@pytest.mark.parametrize(("model", "adapter"), [("base-model", "base"), ("alpha", "alpha@1"), ("alpha@2", "alpha@2")])
@pytest.mark.parametrize("tag", ["", ":latest"])
def test_models_have_the_tag_latest_or_none(rig: Rig, model: str, adapter: str, tag: str) -> None:
    answer = ask(rig, model=model + tag)
    assert answer.headers["x-manylora-adapter"] == adapter
    assert answer.json()["model"] == model + tag


def test_a_whole_answer_to_a_chat(rig: Rig) -> None:
    body = ask(rig, options={"num_predict": 9}).json()
    assert body["message"] == {"role": "assistant", "content": "The quick"}
    assert (body["done"], body["done_reason"]) == (True, "length")
    assert (body["prompt_eval_count"], body["eval_count"]) == (len("[user]hi[assistant]"), 9)
    assert body["load_duration"] == 2_500_000
    assert body["prompt_eval_duration"] == 8_250_000
    assert body["total_duration"] >= body["eval_duration"] >= 0
    assert body["manylora"]["adapter"] is None


def test_a_stream_is_the_default_and_lines_of_json(rig: Rig) -> None:
    *parts, last = lines(rig.client.post("/api/chat", json={"model": "alpha:latest", "messages": MESSAGES}))
    assert "".join(part["message"]["content"] for part in parts) == f"alpha@1: {rig.engine.text}"
    assert not any(part["done"] for part in parts)
    assert last["message"]["content"] == ""
    assert (last["done"], last["done_reason"], last["manylora"]["adapter"]["name"]) == (True, "stop", "alpha")


def test_generate_asks_as_a_chat_does_or_raw(rig: Rig) -> None:
    body = ask(rig, "generate", system="Be brief.").json()
    assert body["response"] == rig.engine.text
    assert rig.engine.codec.decode(rig.engine.generations[-1].prompt_ids) == "[system]Be brief.[user]hi[assistant]"
    ask(rig, "generate", raw=True)
    assert rig.engine.codec.decode(rig.engine.generations[-1].prompt_ids) == "hi"
    assert rig.last_params.max_tokens == rig.engine.context_length - 3
    assert ask(rig, "generate", raw=True, system="x").status_code == 400
    assert ask(rig, "generate", raw=True, think=True).status_code == 400
    parts = lines(ask(rig, "generate", stream=True))
    assert "".join(part["response"] for part in parts) == rig.engine.text


WEATHER: dict[str, Any] = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}


@pytest.mark.parametrize("is_streamed", [False, True])
def test_calls_come_when_they_are_complete_and_go_back_as_they_came(rig: Rig, is_streamed: bool) -> None:
    rig.engine.codec.form, rig.engine.context_length = THINKING, 4000
    rig.engine.text = f"<think>I wonder</think>I look. {CALL}{CALL}"
    answer = ask(rig, tools=[WEATHER], stream=is_streamed)

    parts = lines(answer) if is_streamed else [answer.json()]
    told = [part["message"] for part in parts]
    assert "".join(each.get("thinking", "") for each in told) == "I wonder"
    assert "".join(each["content"] for each in told) == "I look."
    calls = [call for each in told for call in each.get("tool_calls", ())]
    assert [call["function"] for call in calls] == [
        {"index": index, "name": "get_weather", "arguments": {"city": "Paris"}} for index in (0, 1)
    ]
    assert parts[-1]["done_reason"] == "stop"
    assert len([each for each in told if "tool_calls" in each]) == (2 if is_streamed else 1)

    assistant = {"role": "assistant", "content": "I look.", "thinking": "I wonder", "tool_calls": calls}
    result = {"role": "tool", "content": "sun", "tool_name": "get_weather"}
    assert ask(rig, messages=[*MESSAGES, assistant, result], tools=[WEATHER]).status_code == 200
    _, sent, returned = rig.engine.codec.rendered[-1][0]
    assert (sent["content"], sent["reasoning_content"]) == ("I look.", "I wonder")
    assert [call["id"] for call in sent["tool_calls"]] == [call["id"] for call in calls]
    assert sent["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": {"city": "Paris"}}
    assert returned == {"role": "tool", "content": "sun", "name": "get_weather"}


def test_a_call_that_was_cut_is_what_there_is(rig: Rig) -> None:
    rig.engine.codec.form, rig.engine.context_length, rig.engine.text = THINKING, 4000, CALL
    body = ask(rig, tools=[WEATHER], options={"num_predict": len(CALL) - 20}).json()
    [call] = body["message"]["tool_calls"]
    assert (call["function"]["arguments"], body["done_reason"]) == ({}, "length")


@pytest.mark.parametrize("route", ["chat", "generate"])
@pytest.mark.parametrize(
    ("think", "variables"),
    [
        (None, {}),
        (True, {"enable_thinking": True}),
        (False, {"enable_thinking": False}),
        ("high", {"enable_thinking": True, "reasoning_effort": "high"}),
    ],
)
def test_what_is_thought_stands_apart(rig: Rig, route: str, think: Any, variables: dict[str, Any]) -> None:
    rig.engine.codec.form, rig.engine.text = THINKING, "<think>so</think>Yes."
    body = ask(rig, route, think=think).json()

    assert rig.engine.codec.rendered[-1][1].variables == variables
    told = body["message"] if route == "chat" else body
    assert told["content" if route == "chat" else "response"] == "Yes."
    assert told.get("thinking") == (None if think is False else "so")


OPTIONS: list[tuple[str, Any, str, Any]] = [
    ("num_predict", 7, "max_tokens", 7),
    ("temperature", 0.5, "temperature", 0.5),
    ("top_k", 5, "top_k", 5),
    ("top_p", 0.5, "top_p", 0.5),
    ("min_p", 0.1, "min_p", 0.1),
    ("typical_p", 0.2, "typical_p", 0.2),
    ("seed", 5, "seed", 5),
    ("seed", -1, "seed", None),
    ("stop", ["x"], "stop", ("x",)),
    ("repeat_penalty", 1.2, "repetition_penalty", 1.2),
    ("presence_penalty", 1, "presence_penalty", 1.0),
    ("frequency_penalty", 1, "frequency_penalty", 1.0),
]


@pytest.mark.parametrize("route", ["chat", "generate"])
@pytest.mark.parametrize(("option", "value", "param", "expected"), OPTIONS)
def test_every_option_reaches_the_engine(
    rig: Rig, route: str, option: str, value: Any, param: str, expected: Any
) -> None:
    assert ask(rig, route, options={option: value}).status_code == 200
    assert getattr(rig.last_params, param) == expected


@pytest.mark.parametrize("num_predict", [-1, -2])
def test_no_bound_is_the_rest_of_the_context(rig: Rig, num_predict: int) -> None:
    ask(rig, options={"num_predict": num_predict})
    assert rig.last_params.max_tokens == rig.engine.context_length - len("[user]hi[assistant]")


@pytest.mark.parametrize(("form", "part"), [("json", '"object"'), ({"properties": {"mark": {}}}, '"mark"')])
def test_format_holds_the_answer_to_json(rig: Rig, form: Any, part: str) -> None:
    assert ask(rig, format=form).status_code == 200
    [(_, grammar)] = rig.engine.compiled
    assert grammar.kind == "json_schema"
    assert part in grammar.source


def test_log_probabilities(rig: Rig) -> None:
    body = ask(rig, logprobs=True, top_logprobs=1, options={"num_predict": 2}).json()
    assert [each["token"] for each in body["logprobs"]] == ["T", "h"]
    assert body["logprobs"][0]["top_logprobs"] == [{"token": "T", "logprob": -0.5, "bytes": [84]}]
    parts = lines(ask(rig, "generate", stream=True, logprobs=True, options={"num_predict": 2}))
    assert [each["token"] for part in parts for each in part["logprobs"]] == ["T", "h"]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"keep_alive": "5m"}, "keep_alive"),
        ({"keep_alive": 0}, "keep_alive"),
        ({"think": "always"}, "think"),
        ({"tools": [{"function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"function": {"name": "now"}}]}, "no tools"),
        ({"messages": [{"role": "user", "content": "a", "thinking": 5}]}, "messages[0].thinking"),
        ({"messages": [{"role": "tool", "content": "a", "tool_name": 5}]}, "messages[0].tool_name"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"nom": "a"}}]}]},
            "messages[0].tool_calls[0]",
        ),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"options": {"num_ctx": 4096}}, "options.num_ctx"),
        ({"options": {"mirostat": 2}}, "options.mirostat"),
        ({"options": {"temprature": 1}}, "options.temprature"),
        ({"options": {"num_predict": -3}}, "options.num_predict"),
        ({"options": {"num_predict": 0}}, "options.num_predict"),
        ({"options": {"temperature": 3}}, "options.temperature"),
        ({"options": {"top_k": "5"}}, "options.top_k"),
        ({"format": "yaml"}, "format"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "a", "images": ["x"]}]}, "messages[0].images"),
        ({"messages": [{"role": "nobody", "content": "a"}]}, "messages[0].role"),
        ({"nonsense": 1}, "nonsense"),
        ({"top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_what_is_not_served_is_refused_by_name(rig: Rig, body: dict[str, Any], named: str) -> None:
    answer = ask(rig, **body)
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"]
    assert named in answer.json()["error"]


@pytest.mark.parametrize(
    "body",
    [
        {"keep_alive": None, "tools": None, "think": None, "format": ""},
        {"tools": {}, "think": ""},
        {"tools": [], "think": False, "options": {"num_ctx": None, "mirostat": 0, "tfs_z": 1.0}},
    ],
)
def test_what_asks_for_nothing_is_taken(rig: Rig, body: dict[str, Any]) -> None:
    assert ask(rig, **body).status_code == 200


def test_errors_have_their_status_and_ollamas_body(rig: Rig) -> None:
    missing = ask(rig, model="nobody:latest")
    assert missing.status_code == 404
    assert "'nobody'" in missing.json()["error"]
    rig.engine.error_at = 2
    *_, last = lines(ask(rig, stream=True))
    assert last == {"error": "the engine tripped"}
    rig.gate.keys["k"] = Principal("acme", Role.USER)
    refused = ask(rig)
    assert (refused.status_code, list(refused.json())) == (401, ["error"])
    assert isinstance(refused.json()["error"], str)


def test_the_list_has_the_base_and_the_callers_adapters(rig: Rig) -> None:
    models = rig.client.get("/api/tags").json()["models"]
    assert [each["model"] for each in models] == ["base-model:latest", "alpha:latest"]
    assert models[1]["details"]["parent_model"] == "base-model"
    assert models[1]["digest"] == rig.directory.resolve("public", "alpha").digest


@pytest.mark.parametrize("name", ["alpha", "alpha@2:latest", "base-model", "base-model:alpha"])
def test_one_of_them(rig: Rig, name: str) -> None:
    shown = rig.client.post("/api/show", json={"model": name}).json()
    assert shown["model_info"]["manylora.context_length"] == rig.engine.context_length
    assert shown["capabilities"] == ["completion"]
    rig.engine.codec.form = THINKING
    shown = rig.client.post("/api/show", json={"model": name}).json()
    assert shown["capabilities"] == ["completion", "tools", "thinking"]


def test_what_is_not_there_is_not_shown(rig: Rig) -> None:
    assert rig.client.post("/api/show", json={"model": "beta"}).status_code == 404  # another tenant's
    assert rig.client.post("/api/show", json={}).status_code == 400


def test_the_version_is_this_servers(rig: Rig) -> None:
    assert rig.client.get("/api/version").json() == {"version": __version__}
