"""`/v1/responses`: what its fields become, the items of answers, and the events of streams, by OpenAI's own client."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import openai
import pytest
from fastapi import FastAPI
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage, ResponseReasoningItem
from pydantic import BaseModel

from manylora.errors import InvalidRequest
from manylora.tenants.interface import Principal, Role

from .conftest import Rig, typed_events
from .test_tools import CALL, PARAMETERS, THINKING

WEATHER: dict[str, Any] = {"type": "function", "name": "get_weather", "parameters": PARAMETERS}
NOW: dict[str, Any] = {"type": "function", "name": "now"}
TOLD = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}


@pytest.fixture
def url(rig: Rig, serve: Callable[[FastAPI], Any]) -> Iterator[str]:
    rig.engine.context_length = 4000
    with serve(rig.app) as address:
        yield f"{address}/v1"


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        yield client


def ask(rig: Rig, **body: Any) -> httpx2.Response:
    rig.engine.context_length = 4000
    response: httpx2.Response = rig.client.post("/v1/responses", json={"model": "base-model", "input": "hi", **body})
    return response


def events(response: httpx2.Response) -> list[dict[str, Any]]:
    """A stream's events, which are numbered."""
    found = typed_events(response.text)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


# answers


def test_a_text_is_answered_by_a_message(client: openai.OpenAI, rig: Rig) -> None:
    answer = client.responses.create(model="alpha@2", input="hi", instructions="Be brief.", max_output_tokens=12)

    assert answer.output_text == "alpha@2: The"
    assert (answer.status, answer.error) == ("incomplete", None)
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None
    assert answer.usage.input_tokens == len("[system]Be brief.[user]hi[assistant]")
    assert (answer.usage.output_tokens, answer.usage.total_tokens) == (12, answer.usage.input_tokens + 12)
    assert answer.usage.input_tokens_details.cached_tokens == 2
    assert (answer.instructions, answer.max_output_tokens, answer.model) == ("Be brief.", 12, "alpha@2")
    dumped = answer.model_dump()
    assert dumped["store"] is False
    assert dumped["manylora"]["adapter"]["version"] == 2
    [record] = rig.finished
    assert (record.prompt_tokens, record.completion_tokens) == (answer.usage.input_tokens, 12)


def test_a_whole_answer_is_completed(rig: Rig) -> None:
    body = ask(rig, temperature=0.5, metadata={"a": "b"}, user="u", store=True).json()

    assert (body["status"], body["incomplete_details"], body["temperature"]) == ("completed", None, 0.5)
    assert (body["metadata"], body["user"], body["store"]) == ({"a": "b"}, "u", False)
    assert body["completed_at"] >= body["created_at"]
    [item] = body["output"]
    part = {"type": "output_text", "text": rig.engine.text, "annotations": [], "logprobs": []}
    assert (item["status"], item["role"], item["content"]) == ("completed", "assistant", [part])


def test_an_answer_without_a_word_is_an_empty_message(rig: Rig) -> None:
    rig.engine.ids = (901,)
    body = ask(rig, max_output_tokens=1).json()

    assert [part["text"] for item in body["output"] for part in item["content"]] == [""]
    assert [event["type"] for event in events(ask(rig, max_output_tokens=1, stream=True))][2:] == [
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]


def test_calls_are_items_of_their_own_and_go_back_as_they_came(client: openai.OpenAI, rig: Rig) -> None:
    rig.engine.codec.form = THINKING
    rig.engine.text = f"<think>I wonder</think>I look. {CALL}{CALL}"
    tools: Any = [WEATHER, NOW]
    answer = client.responses.create(model="base-model", input="hi", tools=tools)

    thought, said, *called = answer.output
    assert isinstance(thought, ResponseReasoningItem)
    assert thought.content is not None
    assert [part.text for part in thought.content] == ["I wonder"]
    assert isinstance(said, ResponseOutputMessage)
    assert answer.output_text == "I look."
    first, second = (call for call in called if isinstance(call, ResponseFunctionToolCall))
    assert first.arguments == second.arguments == '{"city": "Paris"}'
    assert answer.usage is not None
    assert answer.usage.output_tokens_details.reasoning_tokens == len("<think>I wonder")

    results = [
        {"type": "function_call_output", "call_id": first.call_id, "output": "sun"},
        {"type": "function_call_output", "call_id": second.call_id, "output": [{"type": "input_text", "text": "rain"}]},
    ]
    history: Any = [TOLD, *(item.model_dump() for item in answer.output), *results]
    client.responses.create(model="base-model", input=history, tools=tools)

    user, assistant, sun, rain = rig.last_messages
    assert user == {"role": "user", "content": "hi"}
    assert (assistant["content"], assistant["reasoning_content"]) == ("I look.", "I wonder")
    assert [call["function"] for call in assistant["tool_calls"]] == [
        {"name": "get_weather", "arguments": {"city": "Paris"}}
    ] * 2
    assert [call["id"] for call in assistant["tool_calls"]] == [first.call_id, second.call_id]
    assert sun == {"role": "tool", "content": "sun", "tool_call_id": first.call_id}
    assert rain == {"role": "tool", "content": "rain", "tool_call_id": second.call_id}


@pytest.mark.parametrize("summary", [{"summary": "auto"}, {"generate_summary": "detailed"}])
def test_thoughts_stand_where_a_summary_is_asked_for(rig: Rig, summary: dict[str, str]) -> None:
    rig.engine.codec.form = THINKING
    rig.engine.text = "<think>I wonder</think>Yes."
    body = {"reasoning": {"effort": "low", **summary}, "include": ["reasoning.encrypted_content"]}
    thought, _ = ask(rig, **body).json()["output"]

    assert thought["summary"] == [{"type": "summary_text", "text": "I wonder"}]
    assert "content" not in thought
    assert rig.engine.codec.rendered[-1][1].variables == {"reasoning_effort": "low"}
    names = [event["type"] for event in events(ask(rig, **body, stream=True)) if "reasoning" in event["type"]]
    assert names[0] == "response.reasoning_summary_part.added"
    assert set(names[1:-2]) == {"response.reasoning_summary_text.delta"}
    assert names[-2:] == ["response.reasoning_summary_text.done", "response.reasoning_summary_part.done"]

    sealed = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": thought["encrypted_content"]}
    ask(rig, input=[TOLD, sealed, {"role": "assistant", "content": "Yes."}, TOLD])
    assert rig.last_messages[1]["reasoning_content"] == "I wonder"


def test_thoughts_can_be_left_out(rig: Rig) -> None:
    rig.engine.codec.form = THINKING
    rig.engine.text = "<think>I wonder</think>Yes."
    body = ask(rig, include_reasoning=False).json()

    assert [item["type"] for item in body["output"]] == ["message"]
    assert body["usage"]["output_tokens_details"]["reasoning_tokens"] == len("<think>I wonder")


@pytest.mark.parametrize("is_streamed", [False, True])
def test_log_probabilities_are_those_of_the_text(rig: Rig, is_streamed: bool) -> None:
    rig.engine.codec.form = THINKING
    rig.engine.text = "<think>so</think>Yes."
    include = ["message.output_text.logprobs"]
    answer = ask(rig, top_logprobs=1, include=include, stream=is_streamed)

    if is_streamed:
        found = events(answer)
        body = found[-1]["response"]
        deltas = [event for event in found if event["type"] == "response.output_text.delta"]
        streamed = [entry for event in deltas for entry in event["logprobs"]]
        assert streamed == body["output"][1]["content"][0]["logprobs"]
    else:
        body = answer.json()
    logprobs = body["output"][1]["content"][0]["logprobs"]
    assert "".join(entry["token"] for entry in logprobs) == "</think>Yes."
    assert logprobs[-1] == {
        "token": ".",
        "logprob": -0.5,
        "bytes": [46],
        "top_logprobs": [{"token": ".", "logprob": -0.5, "bytes": [46]}],
    }
    assert ask(rig, top_logprobs=1).json()["output"][1]["content"][0]["logprobs"] == logprobs
    assert ask(rig, include=include).json()["output"][1]["content"][0]["logprobs"][0]["top_logprobs"] == []


# streams


def test_a_stream_of_text_has_the_events_of_openai(client: openai.OpenAI, rig: Rig) -> None:
    with client.responses.stream(model="alpha", input="hi") as stream:
        names = [event.type for event in stream]
        answer = stream.get_final_response()

    assert names[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(names[4:-4]) == {"response.output_text.delta"}
    assert names[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert answer.output_text == f"alpha@1: {rig.engine.text}"
    assert answer.usage is not None
    [record] = rig.finished
    assert (record.prompt_tokens, record.completion_tokens) == (answer.usage.input_tokens, answer.usage.output_tokens)


def test_a_stream_says_what_the_whole_answer_does(rig: Rig) -> None:
    rig.engine.codec.form = THINKING
    rig.engine.text = f"<think>I wonder</think>I look. {CALL}"
    whole, found = ask(rig, tools=[WEATHER]).json(), events(ask(rig, tools=[WEATHER], stream=True))

    last = found[-1]
    assert last["type"] == "response.completed"
    assert last["response"]["usage"] == whole["usage"]
    assert last["response"]["manylora"] == whole["manylora"]
    done = [event["item"] for event in found if event["type"] == "response.output_item.done"]
    assert last["response"]["output"] == done
    unnamed = [[{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in each["output"]] for each in
               (whole, last["response"])]  # fmt: skip
    assert unnamed[0] == unnamed[1]
    added = [event for event in found if event["type"] == "response.output_item.added"]
    assert [(event["output_index"], event["item"]["type"]) for event in added] == [
        (0, "reasoning"),
        (1, "message"),
        (2, "function_call"),
    ]
    for name, text in (("reasoning_text", "I wonder"), ("output_text", "I look.")):
        deltas = [event["delta"] for event in found if event["type"] == f"response.{name}.delta"]
        assert "".join(deltas) == text
        assert [event["text"] for event in found if event["type"] == f"response.{name}.done"] == [text]
    arguments = [event for event in found if event["type"].startswith("response.function_call_arguments")]
    assert "".join(event["delta"] for event in arguments[:-1]) == arguments[-1]["arguments"] == '{"city": "Paris"}'
    assert {event["item_id"] for event in arguments} == {done[2]["id"]}
    assert len(arguments) > 10, "arguments come while they are written"


@pytest.mark.parametrize("error", [InvalidRequest("nothing is left"), RuntimeError("an accident")])
def test_an_error_in_mid_stream_is_a_failed_response(rig: Rig, error: Any) -> None:
    rig.engine.error, rig.engine.error_at = error, 3
    *_, item, last = events(ask(rig, stream=True))

    assert (item["type"], item["item"]["status"]) == ("response.output_item.done", "incomplete")
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["output"] == [item["item"]]
    is_ours = isinstance(error, InvalidRequest)
    assert last["response"]["error"]["code"] == ("invalid_prompt" if is_ours else "server_error")
    assert ("nothing is left" in last["response"]["error"]["message"]) == is_ours
    assert "accident" not in last["response"]["error"]["message"]


def test_an_error_before_the_first_event_has_its_own_status(rig: Rig) -> None:
    rig.engine.error_at = 0
    answer = ask(rig, stream=True)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")


@pytest.mark.anyio
async def test_who_leaves_in_mid_stream_frees_the_sequence(rig: Rig, url: str) -> None:
    rig.engine.text, rig.engine.step_s = "x" * 1000, 0.005
    async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        stream = await client.responses.create(model="base-model", input="hi", stream=True)
        async for event in stream:
            if event.type == "response.output_text.delta":
                break
        assert len(rig.engine.open) == 1
        await stream.close()
    while rig.engine.open or not rig.finished:
        await asyncio.sleep(0.01)
    assert rig.finished[0].outcome == "cancelled"
    assert 0 < rig.finished[0].completion_tokens < 1000


# what is asked for


def test_instructions_and_messages_of_the_system_are_one_where_the_input_begins(rig: Rig) -> None:
    system = {"role": "system", "content": "Be kind."}
    developer = {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be true."}]}
    ask(rig, instructions="Be brief.", input=[system, developer, TOLD, developer])

    assert [(each["role"], each["content"]) for each in rig.last_messages] == [
        ("system", "Be brief.\n\nBe kind.\n\nBe true."),
        ("user", "hi"),
        ("system", "Be true."),
    ]


def test_the_fewest_of_the_oldest_turns_are_dropped(rig: Rig) -> None:
    def say(role: str, text: str) -> dict[str, str]:
        return {"role": role, "content": text}

    turns = [say(role, f"{number}" * 300) for number in range(9) for role in ("user", "assistant")]
    asked: dict[str, Any] = {"instructions": "Be brief.", "input": [*turns, say("user", "and?")]}
    refused = ask(rig, **asked)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    body = ask(rig, **asked, truncation="auto", max_output_tokens=100).json()

    prompt = rig.engine.codec.decode(rig.engine.generations[-1].prompt_ids)
    rest = "".join(f"[{role}]{number}" for number in range(3, 9) for role in ("user", "assistant"))
    assert re.sub(r"(\d)\1+", r"\1", prompt) == f"[system]Be brief.{rest}[user]and?[assistant]"
    assert len(prompt) <= 3900 < len(prompt) + 617, "another turn would have been too many"
    assert (body["truncation"], body["status"]) == ("auto", "completed")
    longest = ask(rig, input=[say("user", "a"), say("user", "x" * 4000)], truncation="auto")
    assert (longest.status_code, longest.json()["error"]["param"]) == (400, "input")


def test_a_turn_of_the_assistant_is_one_message(rig: Rig) -> None:
    rig.engine.codec.form = THINKING

    def thought(text: str) -> dict[str, Any]:
        return {"type": "reasoning", "summary": [{"type": "summary_text", "text": text}]}

    def call(name: str) -> dict[str, Any]:
        return {"type": "function_call", "call_id": name, "name": name, "arguments": "{}", "status": "completed"}

    result = {"type": "function_call_output", "call_id": "a", "output": "", "name": "a"}
    items = [
        TOLD,
        thought("1"),
        call("a"),
        call("b"),
        result,
        thought("2"),
        thought("3"),
        call("c"),
        thought("4"),
        TOLD,
    ]
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}], "phase": "final_answer"}
    ask(rig, input=[*items, refusal, thought("5")])

    told = [
        (each["role"], each["content"], each.get("reasoning_content"), [c["id"] for c in each.get("tool_calls", ())])
        for each in rig.last_messages
    ]
    assert told == [
        ("user", "hi", None, []),
        ("assistant", "", "1", ["a", "b"]),
        ("tool", "", None, []),
        ("assistant", "", "2\n\n3", ["c"]),
        ("assistant", "", "4", []),
        ("user", "hi", None, []),
        ("assistant", "No.", None, []),
        ("assistant", "", "5", []),
    ]
    assert rig.last_messages[2]["name"] == "a"


def test_what_an_adapter_has_locked_is_told_in_the_words_of_this_route(rig: Rig) -> None:
    defaults = {"max_tokens": 5, "choices": ["Yes.", "No."], "temperature": 0, "locked": ["max_tokens", "choices"]}
    rig.directory.defaults["alpha@1"] = json.dumps(defaults)
    assert ask(rig, model="alpha").status_code == 200
    assert (rig.last_params.max_tokens, rig.last_params.temperature) == (5, 0)
    [(_, grammar)] = rig.engine.compiled
    assert grammar.kind == "choice"
    for body, named in (
        ({"max_output_tokens": 6}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
    ):
        refused = ask(rig, model="alpha", **body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, named)


def test_keys_and_quotas_hold_as_everywhere(rig: Rig) -> None:
    rig.gate.is_used_up = True
    assert ask(rig).json()["error"]["code"] == "quota_exceeded"
    rig.gate.keys = {"k1": Principal("acme", Role.USER)}
    assert ask(rig).status_code == 401


class Order(BaseModel):
    """What is to be parsed."""

    dish: str


def test_a_format_holds_the_answer_to_a_schema(client: openai.OpenAI, rig: Rig) -> None:
    rig.engine.text = '{"dish": "soup"}'
    answer = client.responses.parse(model="base-model", input="hi", text_format=Order)

    assert answer.output_parsed == Order(dish="soup")
    client.responses.create(model="base-model", input="hi", text={"format": {"type": "json_object"}})
    client.responses.create(model="base-model", input="hi", text={"format": {"type": "text"}, "verbosity": "medium"})
    schema, anything = (grammar for _, grammar in rig.engine.compiled)
    assert '"dish"' in schema.source
    assert anything.kind == "json_schema"
    assert len(rig.engine.generations) == 3


PASSED: list[tuple[str, Any, str, Any]] = [
    ("temperature", 0.5, "temperature", 0.5),
    ("top_p", 0.5, "top_p", 0.5),
    ("max_output_tokens", 7, "max_tokens", 7),
    ("top_logprobs", 3, "logprobs", 3),
    ("top_k", 5, "top_k", 5),
    ("seed", 5, "seed", 5),
    ("stop", ["x"], "stop", ("x",)),
    ("repetition_penalty", 1.2, "repetition_penalty", 1.2),
    ("min_tokens", 2, "min_tokens", 2),
    ("adapter_id", "alpha@2", "temperature", 1.0),
]


@pytest.mark.parametrize(("name", "value", "param", "expected"), PASSED)
def test_fields_reach_the_engine(rig: Rig, name: str, value: Any, param: str, expected: Any) -> None:
    assert ask(rig, **{name: value}).status_code == 200
    assert getattr(rig.last_params, param) == expected
    adapter = rig.engine.generations[-1].adapter
    assert (None if adapter is None else adapter.label) == ("alpha@2" if name == "adapter_id" else None)


def test_what_codex_and_the_agents_sdk_send_is_taken(rig: Rig) -> None:
    codex = {
        "instructions": "You are Codex.",
        "input": [TOLD],
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": None,
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "thread",
        "client_metadata": {"x-codex-installation-id": "i"},
        "service_tier": None,
    }
    agents = {
        "input": [{"role": "user", "content": "hi"}],
        "include": [],
        "truncation": "disabled",
        "text": {"format": {"type": "text"}},
        "previous_response_id": None,
        "conversation": None,
        "prompt": None,
        "background": False,
        "stream_options": {"include_obfuscation": False},
        "safety_identifier": "s",
    }
    assert events(ask(rig, **codex, stream=True))[-1]["type"] == "response.completed"
    answer = ask(rig, **agents)
    assert (answer.status_code, answer.json()["safety_identifier"]) == (200, "s")
