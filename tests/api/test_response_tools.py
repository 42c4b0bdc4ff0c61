"""Tools of `/v1/responses`: which are offered, which must be called, and those in namespaces."""

import pytest

from .conftest import Rig
from .test_responses import NOW, TOLD, WEATHER, ask, events
from .test_tools import CALL, HERMES


def test_tools_go_to_the_template_and_what_must_be_called_is_a_grammar(rig: Rig) -> None:
    rig.engine.codec.form, rig.engine.text = HERMES, CALL
    strict = {**WEATHER, "description": "Of a city", "strict": True}
    for choice in ("required", {"type": "function", "name": "now"}, None, "none"):
        assert ask(rig, tools=[strict, NOW], tool_choice=choice).status_code == 200

    tools = [tool["function"] for tool in rig.engine.codec.rendered[0][1].tools]
    assert [(tool["name"], tool["description"]) for tool in tools] == [("get_weather", "Of a city"), ("now", "")]
    sources = [grammar.source for _, grammar in rig.engine.compiled]
    assert ["get_weather" in source for source in sources] == [True, False, True]
    assert list(rig.engine.codec.rendered[-1][1].tools) == []


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowed_tools_are_those_that_are_offered(rig: Rig, mode: str) -> None:
    rig.engine.codec.form, rig.engine.text = HERMES, CALL
    allowed = {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": "now"}]}
    body = ask(rig, tools=[WEATHER, NOW], tool_choice=allowed).json()

    assert [tool["function"]["name"] for tool in rig.engine.codec.rendered[-1][1].tools] == ["now"]
    assert len(rig.engine.compiled) == (mode == "required")
    assert body["tool_choice"] == allowed
    assert [tool["name"] for tool in body["tools"]] == ["get_weather", "now"]
    assert [item["type"] for item in body["output"]] == ["message"]


def test_a_function_of_a_namespace_is_chosen_by_both_names(rig: Rig) -> None:
    """And not the one of the same name beside it."""
    rig.engine.codec.form, rig.engine.text = HERMES, CALL
    tools = [NOW, {"type": "namespace", "name": "far", "tools": [WEATHER, NOW]}]
    named = {"type": "function", "name": "now", "namespace": "far"}
    for choice in (named, {"type": "allowed_tools", "mode": "required", "tools": [named]}):
        assert ask(rig, tools=tools, tool_choice=choice).json()["tool_choice"] == choice
    told = [[tool["function"]["name"] for tool in options.tools] for _, options in rig.engine.codec.rendered]
    assert told == [["now", "far.get_weather", "far.now"], ["far.now"]]
    for _, grammar in rig.engine.compiled:
        assert "far.now" in grammar.source
        assert "get_weather" not in grammar.source


def test_parallel_calls_can_be_ruled_out(rig: Rig) -> None:
    rig.engine.codec.form, rig.engine.text = HERMES, CALL * 2
    assert len(ask(rig, tools=[WEATHER]).json()["output"]) == 2
    body = ask(rig, tools=[WEATHER], parallel_tool_calls=False).json()
    assert (len(body["output"]), body["parallel_tool_calls"]) == (1, False)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_functions_of_a_namespace_are_called_by_both_names(rig: Rig, is_streamed: bool) -> None:
    rig.engine.codec.form = HERMES
    rig.engine.text = CALL.replace("get_weather", "far.get_weather") + CALL
    far = {"type": "namespace", "name": "far", "description": "Elsewhere", "tools": [WEATHER, NOW]}
    answer = ask(rig, tools=[WEATHER, far], stream=is_streamed)

    body = events(answer)[-1]["response"] if is_streamed else answer.json()
    told = [tool["function"] for tool in rig.engine.codec.rendered[-1][1].tools]
    assert [(tool["name"], tool["description"]) for tool in told] == [
        ("get_weather", ""),
        ("far.get_weather", "Elsewhere"),
        ("far.now", ""),
    ]
    first, second = body["output"]
    assert (first["name"], first["namespace"]) == ("get_weather", "far")
    assert (second["name"], second.get("namespace")) == ("get_weather", None)
    assert body["tools"] == [WEATHER, far]

    result = {"type": "function_call_output", "call_id": first["call_id"], "name": "get_weather", "namespace": "far"}
    ask(rig, tools=[WEATHER, far], input=[TOLD, first, second, {**result, "output": "sun"}])
    _, assistant, returned = rig.last_messages
    assert [call["function"]["name"] for call in assistant["tool_calls"]] == ["far.get_weather", "get_weather"]
    assert returned["name"] == "far.get_weather"
