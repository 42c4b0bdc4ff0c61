"""docs/tools.md against a real server whose base has random weights: what must be a call is one, by any client."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import jsonschema
import pytest

from tests.e2e.conftest import Server, running

PAGE = (Path(__file__).parents[2] / "docs" / "tools.md").read_text(encoding="utf-8")
BODIES = [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)]
NAME = "smollm2-135m-instruct"
TRIES = 20  # a model of random weights may write until there is no room


@pytest.fixture(scope="module")
def server(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """As the page has it: the base under its usual name, told of tools in words. Its context is longer than others'."""
    folder = tmp_path_factory.mktemp("tools")
    base = folder / "base"
    shutil.copytree(settings["model"], base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    changes = {"model": str(base), "served_name": NAME, "tool_prompt": True, "data_dir": str(folder / "data")}
    with running({**settings, **changes}, folder / "log") as server:
        yield server


def test_the_example_of_the_page_is_answered_by_a_call_of_its_tool(server: Server) -> None:
    [body] = BODIES
    for seed in range(TRIES):
        response = httpx.post(f"{server.url}/v1/chat/completions", json={**body, "seed": seed}, timeout=120)
        assert response.status_code == 200, response.text
        [choice] = response.json()["choices"]
        if choice["finish_reason"] != "length":
            break
    assert choice["finish_reason"] == "tool_calls"
    for call in choice["message"]["tool_calls"]:
        assert call["function"]["name"] == "get_weather"
        schema = body["tools"][0]["function"]["parameters"]
        jsonschema.validate(json.loads(call["function"]["arguments"]), schema)


def test_a_call_is_answered_and_streamed(server: Server) -> None:
    [body] = BODIES
    call: Any = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
    }
    messages: list[Any] = [
        *body["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    for seed in range(TRIES):
        stream = server.client().chat.completions.create(
            model=NAME,
            messages=messages,
            tools=body["tools"],
            tool_choice={"type": "function", "function": {"name": "get_weather"}},
            max_tokens=200,
            seed=seed,
            stream=True,
        )
        chunks = [chunk.choices[0] for chunk in stream if chunk.choices]
        if chunks[-1].finish_reason != "length":
            break
    assert chunks[-1].finish_reason == "tool_calls"
    deltas = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert [delta.id is not None for delta in deltas] == [True, *[False] * (len(deltas) - 1)]
    text = "".join(delta.function.arguments or "" for delta in deltas if delta.function is not None)
    assert set(json.loads(text)) == {"city"}


def test_a_call_is_made_and_answered_by_the_responses_api(server: Server) -> None:
    [body] = BODIES
    client = server.client()
    tools: Any = [{"type": "function", **body["tools"][0]["function"]}]
    asked: Any = body["messages"]
    for seed in range(TRIES):
        answer = client.responses.create(
            model=NAME,
            input=asked,
            tools=tools,
            tool_choice="required",
            max_output_tokens=200,
            extra_body={"seed": seed},
        )
        if answer.status == "completed":
            break
    [*_, call] = answer.output
    assert call.type == "function_call"
    jsonschema.validate(json.loads(call.arguments), tools[0]["parameters"])
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    history: Any = [*asked, *(item.model_dump() for item in answer.output), result]
    with client.responses.stream(
        model=NAME,
        input=history,
        tools=tools,
        tool_choice="none",
        max_output_tokens=5,
        extra_body={"ignore_eos": True},
    ) as stream:
        names = [event.type for event in stream]
    assert (names[0], names[-1]) == ("response.created", "response.incomplete")


def test_a_call_is_made_and_answered_by_anthropics_messages(server: Server) -> None:
    [body] = BODIES
    function = body["tools"][0]["function"]
    tool: Any = {"name": function["name"], "input_schema": function["parameters"], "strict": True}
    asked: Any = {"model": NAME, "messages": body["messages"], "tools": [tool], "tool_choice": {"type": "any"}}
    with anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0) as client:
        for seed in range(TRIES):
            answer = client.messages.create(**asked, max_tokens=200, extra_body={"seed": seed})
            if answer.stop_reason == "tool_use":
                break
        [*_, call] = answer.content
        assert call.type == "tool_use"
        jsonschema.validate(call.input, function["parameters"])
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
        history = [*asked["messages"], {"role": "assistant", "content": answer.content}]
        asked |= {"messages": [*history, {"role": "user", "content": [result]}], "tool_choice": {"type": "none"}}
        counted = client.messages.count_tokens(**asked).input_tokens
        with client.messages.stream(**asked, max_tokens=5, extra_body={"ignore_eos": True}) as stream:
            usage = stream.get_final_message().usage
        assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)
        assert usage.output_tokens == 5
