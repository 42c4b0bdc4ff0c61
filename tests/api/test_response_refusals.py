"""`/v1/responses`: every field with what it does not take, and errors in the words of this route."""

from typing import Any

import pytest

from manylora.chat.format import ChatFormat
from manylora.errors import InvalidGrammar
from manylora.settings import Settings

from .conftest import Rig
from .test_responses import NOW, TOLD, WEATHER, ask


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    """One for all that is refused, since nothing of that is left."""
    return Rig(Settings(data_dir=tmp_path_factory.mktemp("data"), max_body=64 * 1024))


HISTORY: list[dict[str, Any]] = [TOLD, {"type": "function_call", "call_id": "c", "name": "n", "arguments": "{}"}]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["hi"]}, "input[0]"),
        ({"input": [{}] * 2049}, "input"),
        ({"input": [{"content": "hi"}]}, "input[0].type"),
        ({"input": [{"type": 5}]}, "input[0].type"),
        ({"input": [TOLD, {"type": "item_reference", "id": "msg_1"}]}, "input[1].type"),
        ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input[0].type"),
        ({"input": [{"role": "nobody", "content": "hi"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": None}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": 5}]}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "", "a": 1}]}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": ["hi"]}]}, "input[0].content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a", "refusal": "b"}]}]},
            "input[0].content",
        ),
        (
            {"input": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "a", "text": "b"}]}]},
            "input[0].content",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a", "logprobs": [{}]}]}]},
            "input[0].content",
        ),
        ({"input": [{**TOLD, "phase": "commentary"}]}, "input[0].phase"),
        ({"input": [{"role": "assistant", "content": "", "phase": "answer"}]}, "input[0].phase"),
        ({"input": [TOLD, {**HISTORY[1], "phase": "commentary"}]}, "input[1].phase"),
        ({"input": [{**TOLD, "nonsense": 1}]}, "input[0].nonsense"),
        ({"input": [{**TOLD, "status": "done"}]}, "input[0].status"),
        ({"input": [TOLD, {**HISTORY[1], "arguments": "["}]}, "input[1].arguments"),
        ({"input": [TOLD, {**HISTORY[1], "namespace": ""}]}, "input[1].namespace"),
        ({"input": [TOLD, {**HISTORY[1], "async": True}]}, "input[1].async"),
        ({"input": [TOLD, {**HISTORY[1], "call_id": None}]}, "input[1].call_id"),
        ({"input": [TOLD, {"type": "function_call_output", "call_id": "c"}]}, "input[1].output"),
        (
            {"input": [TOLD, {"type": "function_call_output", "call_id": "c", "output": "", "namespace": "n"}]},
            "input[1].namespace",
        ),
        ({"input": [TOLD, {"type": "reasoning", "encrypted_content": "gAAA"}]}, "input[1].encrypted_content"),
        ({"input": [TOLD, {"type": "reasoning", "encrypted_content": "manylora.%"}]}, "input[1].encrypted_content"),
        ({"input": [TOLD, {"type": "reasoning", "summary": [{"type": "x", "text": ""}]}]}, "input[1].summary[0].type"),
        ({"input": HISTORY}, "input"),
        ({"instructions": ["a"]}, "instructions"),
        ({"model": None}, "model"),
        ({"model": "nobody"}, "model"),
        ({"adapter_id": "beta", "model": "alpha"}, "adapter_id"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 4001}, "input"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"n": 2}, "n"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": -1}, "top_logprobs"),
        ({"stop": [""]}, "stop"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"user": "u" * 513}, "user"),
        ({"safety_identifier": "u" * 513}, "safety_identifier"),
        ({"prompt_cache_key": 5}, "prompt_cache_key"),
        ({"client_metadata": {"a": "b" * 16_384}}, "client_metadata"),
        ({"client_metadata": {str(n): "" for n in range(17)}}, "client_metadata"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"include": "all"}, "include"),
        ({"truncation": "middle"}, "truncation"),
        ({"store": "yes"}, "store"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"reasoning": {"effort": "extreme"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "concise"}}, "reasoning.summary"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"reasoning": {"summary": "auto", "generate_summary": "detailed"}}, "reasoning.generate_summary"),
        ({"reasoning": "high"}, "reasoning"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": 5}}}, "text.format.schema"),
        ({"text": {"format": {"type": "text", "schema": {"type": "object"}}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_object", "name": "x"}}}, "text.format.name"),
        ({"text": {"format": {"type": "json_object", "strict": True}}}, "text.format.strict"),
        ({"text": "short"}, "text"),
        ({"text": {"format": {"type": "json_object"}}, "guided_regex": "a"}, "guided_regex"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [NOW, {"type": "mcp", "server_label": "x"}]}, "tools[1].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "namespace", "name": "a"}]}, "tools[0].tools"),
        ({"tools": [{"type": "namespace", "name": "", "tools": [NOW]}]}, "tools[0].name"),
        ({"tools": [{"type": "namespace", "name": "a b", "tools": [NOW]}]}, "tools[0].tools[0].name"),
        ({"tools": [{"type": "namespace", "name": "a", "tools": [{"type": "custom"}]}]}, "tools[0].tools[0].type"),
        ({"tools": [{"type": "namespace", "name": "a", "tools": [NOW] * 129}]}, "tools[0].tools"),
        ({"tools": [{"type": "function", "function": {"name": "x"}}]}, "tools[0].function"),
        ({"tools": [{**NOW, "name": "a b"}]}, "tools[0].name"),
        ({"tools": [NOW, NOW]}, "tools[1].name"),
        ({"tools": [{**NOW, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [NOW] * 129}, "tools"),
        ({"tools": [NOW]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "now"}}, "tools": [NOW]}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}, "tools": [NOW]}, "tool_choice"),
        (
            {
                "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "x"}]},
                "tools": [NOW],
            },
            "tool_choice",
        ),
        ({"tool_choice": {"type": "function", "name": "now", "namespace": "a"}, "tools": [NOW]}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "now", "strict": True}, "tools": [NOW]}, "tool_choice"),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "name": "now", "namespace": "a"}],
                },
                "tools": [NOW],
            },
            "tool_choice",
        ),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "name": "now", "server_label": "a"}],
                },
                "tools": [NOW],
            },
            "tool_choice",
        ),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_what_is_not_served_is_refused_by_name(refusing: Rig, body: dict[str, Any], named: str) -> None:
    answer = ask(refusing, **body)
    assert answer.status_code == (404 if body.get("model") == "nobody" else 400)
    assert answer.json()["error"]["param"] == named
    assert len(answer.content) < 1500
    assert refusing.engine.generations == []


def test_errors_of_a_chat_are_told_in_the_words_of_this_route(rig: Rig) -> None:
    rig.engine.codec.form = ChatFormat(takes_tools=True, syntax="hermes")
    rig.engine.refuse_grammar = InvalidGrammar("no", keys=("pattern",))
    schema = {"type": "object", "properties": {"city": {"pattern": "a"}}}
    strict = {**WEATHER, "parameters": schema, "strict": True}
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_weather"}]}
    answer = ask(rig, tools=[NOW, strict], tool_choice=allowed)
    assert answer.json()["error"]["param"] == "tools[1].parameters.properties.city.pattern"

    form = {"type": "json_schema", "name": "x", "schema": schema}
    answer = ask(rig, text={"format": form})
    assert answer.json()["error"]["param"] == "text.format.schema.properties.city.pattern"


def test_a_body_that_is_no_object_is_refused(rig: Rig) -> None:
    assert rig.client.post("/v1/responses", json=[]).status_code == 400
    assert rig.client.get("/v1/responses/resp_1").status_code == 404
