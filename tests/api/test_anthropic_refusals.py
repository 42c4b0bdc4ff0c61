"""`/v1/messages`: every field with what it does not take, in Anthropic's error bodies."""

from typing import Any

import pytest

from manylora.chat.format import ChatFormat
from manylora.errors import Draining, InvalidGrammar
from manylora.settings import Settings
from manylora.tenants.interface import Principal, Role

from .conftest import Rig
from .test_anthropic import HI, NOW, WEATHER, ask


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    """One for all that is refused, since nothing of that is left."""
    return Rig(Settings(data_dir=tmp_path_factory.mktemp("data"), max_body=64 * 1024))


def turn(*blocks: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(blocks)}]}


IMAGE = {"type": "image", "source": {"type": "url", "url": "x"}}
CALLED = {"type": "tool_use", "id": "c", "name": "now", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "c"}
FORMAT = {"type": "json_schema", "schema": {"type": "object", "properties": {"city": {"pattern": "a"}}}}

BODIES: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{}] * 2049}, "messages"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{**HI, "name": "n"}]}, "messages[0].name"),
    (turn(), "messages[0].content"),
    (turn("hi"), "messages[0].content[0]"),
    (turn({"type": "text", "text": "a"}, IMAGE), "messages[0].content[1]"),
    (turn({"type": "document", "source": {}}), "messages[0].content[0]"),
    (turn({"type": 5}), "messages[0].content[0]"),
    (turn({"type": "text"}), "messages[0].content[0].text"),
    (turn({"type": "text", "text": "a", "citations": [{}]}), "messages[0].content[0].citations"),
    (turn({"type": "text", "text": "a", "cache_control": 5}), "messages[0].content[0].cache_control"),
    (turn(CALLED), "messages[0].content[0]"),
    (turn({"type": "thinking", "thinking": "a"}), "messages[0].content[0]"),
    (turn(RESULT, role="assistant"), "messages[0].content[0]"),
    (turn(CALLED, role="assistant"), "messages[0]"),
    (turn({**CALLED, "input": "{}"}, role="assistant"), "messages[0].content[0].input"),
    (turn({**CALLED, "id": ""}, role="assistant"), "messages[0].content[0].id"),
    (turn({**CALLED, "toolset_name": "x"}, role="assistant"), "messages[0].content[0].toolset_name"),
    (turn({"type": "redacted_thinking", "data": "x"}, role="assistant"), "messages[0].content[0]"),
    (turn({**RESULT, "tool_use_id": None}), "messages[0].content[0].tool_use_id"),
    (turn({**RESULT, "is_error": "no"}), "messages[0].content[0].is_error"),
    (turn({**RESULT, "content": 5}), "messages[0].content[0].content"),
    (turn({**RESULT, "content": [IMAGE]}), "messages[0].content[0].content[0]"),
    ({"system": 5}, "system"),
    ({"system": [IMAGE]}, "system[0]"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
    ({"tools": [{"name": "x"}]}, "tools[0].input_schema"),
    ({"tools": [{**NOW, "name": "a b"}]}, "tools[0].name"),
    ({"tools": [NOW, NOW]}, "tools[1].name"),
    ({"tools": [{**NOW, "input_examples": [{}]}]}, "tools[0].input_examples"),
    ({"tools": [{**NOW, "defer_loading": True}]}, "tools[0].defer_loading"),
    ({"tools": [NOW] * 129}, "tools"),
    ({"tools": [NOW]}, "tools"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"tool_choice": {"type": "auto", "name": "now"}}, "tool_choice.name"),
    ({"tool_choice": {"type": "tool", "name": "x"}, "tools": [NOW]}, "tool_choice"),
    ({"tool_choice": {"type": "always"}}, "tool_choice.type"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"thinking": {"type": "on"}}, "thinking.type"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "adaptive", "budget_tokens": 2000}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "adaptive", "display": "short"}}, "thinking.display"),
    ({"thinking": {"type": "disabled", "display": "omitted"}}, "thinking.display"),
    (
        {"thinking": {"type": "disabled"}, "chat_template_kwargs": {"enable_thinking": True}},
        "chat_template_kwargs.enable_thinking",
    ),
    ({"output_config": {"effort": "extreme"}}, "output_config.effort"),
    ({"output_config": {"format": {"type": "json_object"}}}, "output_config.format.type"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ({"cache_control": 5}, "cache_control"),
    ({"mcp_servers": [{}]}, "mcp_servers"),
    ({"context_management": {"edits": [{}]}}, "context_management"),
    ({"nonsense": 1}, "nonsense"),
]
OF_ANSWERS: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"stop_sequences": "x"}, "stop_sequences"),
    ({"stop_sequences": [5]}, "stop_sequences[0]"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"stop_sequences": ["x"] * 33}, "stop_sequences"),
    ({"stop": ["x"]}, "stop"),
    ({"temperature": 3}, "temperature"),
    ({"top_k": "5"}, "top_k"),
    ({"n": 2}, "n"),
    ({"stream": "yes"}, "stream"),
    ({"metadata": {"user_id": "u" * 513}}, "metadata.user_id"),
    ({"metadata": {"user": "u"}}, "metadata.user"),
    ({"service_tier": "default"}, "service_tier"),
    ({"speed": "fast"}, "speed"),
    ({"container": "c"}, "container"),
    ({"output_config": {"format": FORMAT}, "guided_regex": "a"}, "guided_regex"),
]


@pytest.mark.parametrize(("body", "named"), [*BODIES, *OF_ANSWERS])
def test_what_is_not_served_is_refused_by_name(refusing: Rig, body: dict[str, Any], named: str) -> None:
    answer = ask(refusing, **body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert answer.json() == {"type": "error", "error": {"type": "invalid_request_error", "message": error["message"]}}
    assert f"'{named}" in error["message"] or error["message"].startswith(f"{named}:")
    assert refusing.engine.generations == []


@pytest.mark.parametrize(("body", "named"), BODIES[::7])
def test_what_is_counted_is_checked_as_what_is_answered(refusing: Rig, body: dict[str, Any], named: str) -> None:
    answer = ask(refusing, "/count_tokens", **body)
    assert answer.status_code == 400
    assert named in answer.json()["error"]["message"]


def test_errors_of_a_chat_are_told_in_the_words_of_this_route(rig: Rig) -> None:
    rig.engine.codec.form = ChatFormat(takes_tools=True, syntax="hermes")
    rig.engine.refuse_grammar = InvalidGrammar("no", keys=("pattern",))
    tools = [NOW, {**WEATHER, "input_schema": FORMAT["schema"], "strict": True}]
    for body, named in (
        ({"tools": tools}, "tools[1].input_schema.properties.city.pattern"),
        ({"output_config": {"format": FORMAT}}, "output_config.format.schema.properties.city.pattern"),
    ):
        assert ask(rig, **body).json()["error"]["message"] == f"{named}: no"


def test_statuses_have_the_types_of_anthropic(rig: Rig) -> None:
    def kind(**body: Any) -> tuple[int, str]:
        answer = ask(rig, **body)
        assert answer.json()["type"] == "error"
        return answer.status_code, answer.json()["error"]["type"]

    assert kind(model="nobody") == (404, "not_found_error")
    assert kind(messages=[{"role": "user", "content": "x" * 70_000}]) == (413, "request_too_large")
    rig.engine.refuse = Draining("bye")
    assert kind() == (503, "overloaded_error")
    rig.engine.refuse, rig.engine.error_at = None, 0
    assert kind() == (500, "api_error")
    rig.gate.is_used_up = True
    assert kind() == (429, "rate_limit_error")
    rig.gate.keys = {"k1": Principal("acme", Role.USER)}
    assert kind() == (401, "authentication_error")
    assert rig.client.get("/v1/messages/batches").json()["error"]["type"] == "not_found_error"
