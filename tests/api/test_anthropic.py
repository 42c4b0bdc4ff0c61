"""`/v1/messages`: what its fields become, blocks and events of answers, by Anthropic's own client."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic.types import TextBlock, ThinkingBlock, ToolUseBlock
from fastapi import FastAPI
from pydantic import BaseModel

from manylora.engine.interface import FinishReason
from manylora.errors import QueueFull
from manylora.settings import Settings
from manylora.tenants.interface import Principal, Role

from .conftest import Rig, typed_events
from .test_tools import CALL, HERMES, PARAMETERS, THINKING

HI: Any = {"role": "user", "content": "hi"}
WEATHER: dict[str, Any] = {"name": "get_weather", "input_schema": PARAMETERS}
NOW: dict[str, Any] = {"name": "now", "input_schema": {"type": "object"}}
ON: Any = {"type": "adaptive"}


@pytest.fixture
def url(rig: Rig, serve: Callable[[FastAPI], Any]) -> Iterator[str]:
    rig.engine.context_length = 4000
    with serve(rig.app) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0) as client:
        yield client


def ask(rig: Rig, route: str = "", **body: Any) -> httpx2.Response:
    rig.engine.context_length = 4000
    limit = {} if route else {"max_tokens": 500}
    sent = {"model": "base-model", "messages": [HI], **limit, **body}
    response: httpx2.Response = rig.client.post(f"/v1/messages{route}", json=sent)
    return response


# answers


def test_a_message_is_answered_by_text(client: anthropic.Anthropic, rig: Rig) -> None:
    answer = client.messages.create(model="alpha@2", max_tokens=12, system="Be brief.", messages=[HI])

    [block] = answer.content
    assert isinstance(block, TextBlock)
    assert block.text == "alpha@2: The"
    assert (answer.role, answer.model, answer.stop_reason, answer.stop_sequence) == (
        "assistant",
        "alpha@2",
        "max_tokens",
        None,
    )
    usage = answer.usage
    assert (usage.cache_read_input_tokens, usage.output_tokens) == (2, 12)
    assert usage.input_tokens + 2 == len("[system]Be brief.[user]hi[assistant]")
    assert answer.model_dump()["manylora"]["adapter"]["version"] == 2
    [record] = rig.finished
    assert (record.prompt_tokens, record.completion_tokens) == (usage.input_tokens + 2, 12)


def test_reasons_to_stop(rig: Rig) -> None:
    assert ask(rig).json()["stop_reason"] == "end_turn"
    rig.engine.last_stop = " fox"
    body = ask(rig, stop_sequences=[" fox"]).json()
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", " fox")
    assert rig.last_params.stop == (" fox",)
    rig.engine.last_stop, rig.engine.text = None, "x" * 5000
    assert ask(rig).json()["stop_reason"] == "max_tokens"
    assert ask(rig, max_tokens=100_000).json()["stop_reason"] == "model_context_window_exceeded"
    assert rig.last_params.max_tokens == 4000 - len("[user]hi[assistant]")
    refused = ask(rig, messages=[{"role": "user", "content": "x" * 4000}])
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")


def test_an_answer_without_a_word_has_no_block(rig: Rig) -> None:
    rig.engine.ids = (901,)
    assert ask(rig, max_tokens=1).json()["content"] == []
    assert [event["type"] for event in typed_events(ask(rig, max_tokens=1, stream=True).text)] == [
        "message_start",
        "message_delta",
        "message_stop",
    ]


def test_calls_are_blocks_and_go_back_as_they_came(client: anthropic.Anthropic, rig: Rig) -> None:
    rig.engine.codec.form = THINKING
    rig.engine.text = f"<think>I wonder</think>I look. {CALL}{CALL}"
    tools: Any = [WEATHER, NOW]
    asked: Any = [HI]
    answer = client.messages.create(model="base-model", max_tokens=500, messages=asked, tools=tools, thinking=ON)

    thought, said, first, second = answer.content
    assert isinstance(thought, ThinkingBlock)
    assert (thought.thinking, bool(thought.signature)) == ("I wonder", True)
    assert isinstance(said, TextBlock)
    assert said.text == "I look."
    assert isinstance(first, ToolUseBlock)
    assert isinstance(second, ToolUseBlock)
    assert first.input == second.input == {"city": "Paris"}
    assert answer.stop_reason == "tool_use"
    assert answer.usage.output_tokens_details is not None
    assert answer.usage.output_tokens_details.thinking_tokens == len("<think>I wonder")

    results: Any = [
        {"type": "tool_result", "tool_use_id": first.id, "content": "sun"},
        {
            "type": "tool_result",
            "tool_use_id": second.id,
            "is_error": True,
            "content": [{"type": "text", "text": "no"}, {"type": "text", "text": "net"}],
        },
        {"type": "text", "text": "And?", "cache_control": {"type": "ephemeral"}},
    ]
    history: Any = [*asked, {"role": "assistant", "content": answer.content}, {"role": "user", "content": results}]
    client.messages.create(model="base-model", max_tokens=5, messages=history, tools=tools)

    _, assistant, sun, error, more = rig.last_messages
    assert (assistant["content"], assistant["reasoning_content"]) == ("I look.", "I wonder")
    assert [call["id"] for call in assistant["tool_calls"]] == [first.id, second.id]
    assert assistant["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": {"city": "Paris"}}
    assert sun == {"role": "tool", "content": "sun", "tool_call_id": first.id}
    assert error["content"] == "Error: no\nnet"
    assert more == {"role": "user", "content": "And?"}


@pytest.mark.parametrize(
    ("written", "expected"),
    [('{"city": "Paris", "day": "Mon', {"city": "Paris"}), ("", {}), ("{nothing", {}), ("{", {})],
)
def test_arguments_that_were_cut_are_what_there_is(rig: Rig, written: str, expected: Any) -> None:
    rig.engine.codec.form = HERMES
    rig.engine.text = f'<tool_call>\n{{"name": "get_weather", "arguments": {written}'
    rig.engine.last_reason = FinishReason.LENGTH
    body = ask(rig, tools=[WEATHER]).json()
    assert ([block["input"] for block in body["content"]], body["stop_reason"]) == ([expected], "max_tokens")


# streams


def test_a_stream_has_the_events_of_anthropic(client: anthropic.Anthropic, rig: Rig) -> None:
    with client.messages.stream(model="alpha", max_tokens=500, messages=[HI]) as stream:
        text = "".join(stream.text_stream)
        answer = stream.get_final_message()

    assert text == f"alpha@1: {rig.engine.text}"
    [record] = rig.finished
    total = answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)
    assert (record.prompt_tokens, record.completion_tokens) == (total, answer.usage.output_tokens)
    names = [event["type"] for event in typed_events(ask(rig, stream=True).text)]
    assert names[:2] == ["message_start", "content_block_start"]
    assert set(names[2:-3]) == {"content_block_delta"}
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_a_stream_says_what_the_whole_answer_does(rig: Rig) -> None:
    rig.engine.codec.form = THINKING
    rig.engine.text = f"<think>I wonder</think>I look. {CALL}"
    asked: dict[str, Any] = {"tools": [WEATHER], "thinking": ON}
    whole, found = ask(rig, **asked).json(), typed_events(ask(rig, **asked, stream=True).text)

    start, *middle, last, _ = found
    assert start["message"]["content"] == []
    assert last["usage"] == whole["usage"]
    assert last["manylora"] == whole["manylora"]
    assert last["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    begun = [event["content_block"] for event in middle if event["type"] == "content_block_start"]
    assert [block["type"] for block in begun] == ["thinking", "text", "tool_use"]
    assert begun[2]["input"] == {}
    for index, (kind, field, text) in enumerate(
        (
            ("thinking_delta", "thinking", "I wonder"),
            ("text_delta", "text", "I look."),
            ("input_json_delta", "partial_json", '{"city": "Paris"}'),
        )
    ):
        own = [event for event in middle if event["index"] == index]
        assert (own[0]["type"], own[-1]["type"]) == ("content_block_start", "content_block_stop")
        deltas = [event["delta"] for event in own[1:-1]]
        if kind == "thinking_delta":
            assert deltas.pop()["type"] == "signature_delta"
        assert {delta["type"] for delta in deltas} == {kind}
        assert "".join(delta[field] for delta in deltas) == text
        assert len(deltas) > 3, "they come while they are written"


@pytest.mark.parametrize("error", [QueueFull("come back"), RuntimeError("an accident")])
def test_an_error_in_mid_stream_is_an_event(rig: Rig, url: str, error: Any) -> None:
    rig.engine.error, rig.engine.error_at = error, 3
    last = typed_events(ask(rig, stream=True).text)[-1]
    kind = "rate_limit_error" if isinstance(error, QueueFull) else "api_error"
    assert (last["type"], last["error"]["type"]) == ("error", kind)
    assert "accident" not in last["error"]["message"]
    with (
        anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0) as client,
        pytest.raises(anthropic.APIStatusError),
        client.messages.stream(model="alpha", max_tokens=500, messages=[HI]) as stream,
    ):
        stream.until_done()


def test_a_stream_that_waits_is_pinged(settings: Settings) -> None:
    rig = Rig(settings.model_copy(update={"stream_keep_alive_s": 0.01}))
    rig.engine.step_s = 0.2
    found = typed_events(ask(rig, max_tokens=2, stream=True).text)
    assert found[0] == {"type": "ping"}
    assert [event["type"] for event in found if event["type"] != "ping"][0] == "message_start"  # noqa: RUF015


@pytest.mark.anyio
async def test_who_leaves_in_mid_stream_frees_the_sequence(rig: Rig, url: str) -> None:
    rig.engine.text, rig.engine.step_s = "x" * 1000, 0.005
    async with (
        anthropic.AsyncAnthropic(base_url=url, api_key="unused", max_retries=0) as client,
        client.messages.stream(model="base-model", max_tokens=900, messages=[HI]) as stream,
    ):
        async for event in stream:
            if event.type == "content_block_delta":
                break
        assert len(rig.engine.open) == 1
    while rig.engine.open or not rig.finished:
        await asyncio.sleep(0.01)
    assert rig.finished[0].outcome == "cancelled"
    assert 0 < rig.finished[0].completion_tokens < 900


# what is asked for


def test_turns_of_one_role_are_one_and_a_last_one_is_the_beginning_of_the_answer(rig: Rig) -> None:
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    told = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "citations": {"enabled": False}}]
    begun = {"role": "assistant", "content": "The answer"}
    later = {"role": "system", "content": "Be kind."}
    ask(rig, system=system, messages=[{"role": "user", "content": told}, HI, later, begun, begun])

    assert [(each["role"], each["content"]) for each in rig.last_messages] == [
        ("system", "Be brief."),
        ("user", "a\nb\nhi"),
        ("system", "Be kind."),
        ("assistant", "The answer\nThe answer"),
    ]
    assert rig.engine.codec.rendered[-1][1].continue_final
    ask(rig, system=[])
    assert [each["role"] for each in rig.last_messages] == ["user"]
    assert not rig.engine.codec.rendered[-1][1].continue_final


def thinking_at(effort: str) -> dict[str, Any]:
    return {"enable_thinking": True, "reasoning_effort": effort}


@pytest.mark.parametrize(
    ("thinking", "effort", "variables", "is_shown"),
    [
        (None, None, {}, False),
        (None, "max", {"reasoning_effort": "max"}, False),
        ({"type": "disabled"}, None, {"enable_thinking": False}, False),
        ({"type": "adaptive"}, None, {"enable_thinking": True}, True),
        ({"type": "adaptive", "display": "omitted"}, None, {"enable_thinking": True}, False),
        ({"type": "enabled", "budget_tokens": 1024}, None, thinking_at("low"), True),
        ({"type": "enabled", "budget_tokens": 2000}, None, thinking_at("medium"), True),
        ({"type": "enabled", "budget_tokens": 9000}, "low", thinking_at("low"), True),
        ({"type": "enabled", "budget_tokens": 9000}, None, thinking_at("high"), True),
        ({"type": "enabled", "budget_tokens": 1024}, "max", thinking_at("low"), True),
    ],
)
def test_thinking_is_up_to_the_template_and_shown_where_it_is_asked_for(
    rig: Rig, thinking: Any, effort: Any, variables: dict[str, Any], is_shown: bool
) -> None:
    rig.engine.codec.form, rig.engine.text = THINKING, "<think>so</think>Yes."
    body = ask(rig, thinking=thinking, output_config={"effort": effort}).json()

    assert rig.engine.codec.rendered[-1][1].variables == variables
    assert [block["type"] for block in body["content"]] == (["thinking", "text"] if is_shown else ["text"])
    assert body["usage"]["output_tokens_details"]["thinking_tokens"] == len("<think>so")


def test_a_null_in_the_templates_variables_says_nothing_of_thinking(rig: Rig) -> None:
    answer = ask(rig, thinking={"type": "disabled"}, chat_template_kwargs={"enable_thinking": None})

    assert answer.status_code == 200
    assert rig.engine.codec.rendered[-1][1].variables == {"enable_thinking": False}


def test_tools_go_to_the_template_and_what_must_be_called_is_a_grammar(rig: Rig) -> None:
    rig.engine.codec.form, rig.engine.text = HERMES, CALL * 2
    strict = {**WEATHER, "type": "custom", "description": "Of a city", "strict": True, "eager_input_streaming": True}
    choices = ({"type": "any"}, {"type": "tool", "name": "now"}, {"type": "auto"}, {"type": "none"})
    bodies = [ask(rig, tools=[strict, NOW], tool_choice=choice).json() for choice in choices]

    tools = [tool["function"] for tool in rig.engine.codec.rendered[0][1].tools]
    assert [(tool["name"], tool["description"]) for tool in tools] == [("get_weather", "Of a city"), ("now", "")]
    assert ["get_weather" in grammar.source for _, grammar in rig.engine.compiled] == [True, False, True]
    assert list(rig.engine.codec.rendered[-1][1].tools) == []
    assert [body["stop_reason"] for body in bodies] == ["tool_use", "tool_use", "tool_use", "end_turn"]
    assert len(bodies[0]["content"]) == 2
    one = ask(rig, tools=[NOW, WEATHER], tool_choice={"type": "auto", "disable_parallel_tool_use": True}).json()
    assert len(one["content"]) == 1


class Order(BaseModel):
    """What is to be parsed."""

    dish: str


def test_a_format_holds_the_answer_to_a_schema(client: anthropic.Anthropic, rig: Rig) -> None:
    rig.engine.text = '{"dish": "soup"}'
    answer = client.messages.parse(model="base-model", max_tokens=500, messages=[HI], output_format=Order)

    assert answer.parsed_output == Order(dish="soup")
    [(_, grammar)] = rig.engine.compiled
    assert '"dish"' in grammar.source


PASSED: list[tuple[str, Any, str, Any]] = [
    ("temperature", 0.5, "temperature", 0.5),
    ("top_p", 0.5, "top_p", 0.5),
    ("max_tokens", 7, "max_tokens", 7),
    ("top_k", 5, "top_k", 5),
    ("seed", 5, "seed", 5),
    ("stop_sequences", ["x", "y"], "stop", ("x", "y")),
    ("min_tokens", 2, "min_tokens", 2),
    ("service_tier", "standard_only", "temperature", 1.0),
    ("adapter_id", "alpha@2", "temperature", 1.0),
]


@pytest.mark.parametrize(("name", "value", "param", "expected"), PASSED)
def test_fields_reach_the_engine(rig: Rig, name: str, value: Any, param: str, expected: Any) -> None:
    assert ask(rig, **{name: value}).status_code == 200
    assert getattr(rig.last_params, param) == expected
    adapter = rig.engine.generations[-1].adapter
    assert (None if adapter is None else adapter.label) == ("alpha@2" if name == "adapter_id" else None)


def test_what_clients_always_send_is_taken(client: anthropic.Anthropic, rig: Rig) -> None:
    answer: Any = client.beta.messages.create(
        model="base-model",
        max_tokens=5,
        messages=[HI],
        metadata={"user_id": "u"},
        cache_control={"type": "ephemeral"},
        betas=["interleaved-thinking-2025-05-14"],
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    )
    assert answer.content[0].text == "The q"
    assert rig.client.post("/v1/messages?alpha=true", json={}).status_code == 400


def test_tokens_are_counted_as_they_are_charged(client: anthropic.Anthropic, rig: Rig) -> None:
    rig.engine.codec.form = THINKING
    asked: dict[str, Any] = {
        "model": "alpha",
        "messages": [HI],
        "system": "Be brief.",
        "tools": [WEATHER],
        "thinking": ON,
    }
    counted = client.messages.count_tokens(**asked).input_tokens
    usage = client.messages.create(**asked, max_tokens=5).usage

    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    assert len(rig.finished) == 1, "counting is no usage"
    rig.engine.context_length = 100
    assert (
        client.messages.count_tokens(model="alpha", messages=[{"role": "user", "content": "x" * 500}]).input_tokens
        > 500
    )


# keys and errors


@pytest.mark.parametrize("key", [{"api_key": "k1"}, {"api_key": None, "auth_token": "k1"}])
def test_keys_are_taken_as_anthropics_clients_send_them(rig: Rig, url: str, key: Any) -> None:
    rig.gate.keys = {"k1": Principal("acme", Role.USER)}
    with anthropic.Anthropic(base_url=url, max_retries=0, **key) as client:
        client.messages.create(model="base-model", max_tokens=5, messages=[HI])
    assert rig.engine.generations[-1].tenant == "acme"
    with (
        anthropic.Anthropic(base_url=url, api_key="k2", max_retries=0) as client,
        pytest.raises(anthropic.AuthenticationError),
    ):
        client.messages.create(model="base-model", max_tokens=5, messages=[HI])
