"""Tools, reasoning and the other fields of a chat's template, from the request to the answer and in streams."""

import json
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageFunctionToolCall
from pydantic import BaseModel

from manylora.chat.format import ChatFormat
from manylora.chat.reading import Reading
from manylora.errors import InvalidGrammar

from .conftest import Rig, served

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: dict[str, Any] = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
HERMES = ChatFormat(takes_tools=True, takes_documents=True, syntax="hermes")
THINKING = ChatFormat(takes_tools=True, syntax="hermes", reasoning=("<think>", "</think>"))


@pytest.fixture
def hermes(rig: Rig) -> Rig:
    rig.engine.codec.form = HERMES
    rig.engine.context_length = 4000
    rig.engine.text = CALL
    return rig


def rendered(rig: Rig) -> tuple[list[dict[str, Any]], Any]:
    return rig.engine.codec.rendered[-1]


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def test_a_call_is_an_answer_of_its_own(hermes: Rig) -> None:
    [choice] = hermes.chat(tools=[WEATHER, NOW]).json()["choices"]

    [call] = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    assert call["id"].startswith("call_")
    _, options = rendered(hermes)
    assert [tool["function"]["name"] for tool in options.tools] == ["get_weather", "now"]
    assert hermes.engine.compiled == []


def test_text_beside_a_call_and_an_answer_without_one(hermes: Rig) -> None:
    hermes.engine.text = f"I look. {CALL}"
    [choice] = hermes.chat(tools=[WEATHER]).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("I look.", "tool_calls")

    hermes.engine.text = "It is noon."
    [choice] = hermes.chat(tools=[WEATHER]).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("It is noon.", "stop")
    assert "tool_calls" not in choice["message"]


def test_an_answer_that_was_cut_says_so(hermes: Rig) -> None:
    [choice] = hermes.chat(tools=[WEATHER], max_tokens=50).json()["choices"]

    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "get_weather"


def test_a_stream_has_calls_by_their_index(hermes: Rig) -> None:
    hermes.engine.text = f"Hm. {CALL}\n{CALL}"
    data = events(hermes.chat(tools=[WEATHER], stream=True, n=2).text)

    for index in (0, 1):
        choices = [choice for event in data for choice in event["choices"] if choice["index"] == index]
        deltas = [call for choice in choices for call in choice["delta"].get("tool_calls", ())]
        assert "".join(choice["delta"].get("content") or "" for choice in choices) == "Hm."
        assert choices[-1]["finish_reason"] == "tool_calls"
        assert [call["index"] for call in deltas if "id" in call] == [0, 1]
        assert len({call["id"] for call in deltas if "id" in call}) == 2
        for number in (0, 1):
            text = "".join(call["function"]["arguments"] for call in deltas if call["index"] == number)
            assert json.loads(text) == {"city": "Paris"}
        assert len(deltas) > 10, "arguments come while they are written"


def test_parallel_calls_can_be_ruled_out(hermes: Rig) -> None:
    hermes.engine.text = f"{CALL}\n{CALL}"

    assert len(hermes.chat(tools=[WEATHER]).json()["choices"][0]["message"]["tool_calls"]) == 2
    [choice] = hermes.chat(tools=[WEATHER], parallel_tool_calls=False).json()["choices"]
    assert len(choice["message"]["tool_calls"]) == 1


@pytest.mark.parametrize(
    "choice", ["required", *({**kind, "function": {"name": "get_weather"}} for kind in ({"type": "function"}, {}))]
)
def test_a_call_that_must_be_made_is_a_grammar(hermes: Rig, choice: Any) -> None:
    assert hermes.chat(tools=[WEATHER, NOW], tool_choice=choice).status_code == 200

    [(tenant, grammar)] = hermes.engine.compiled
    assert (tenant, grammar.kind) == ("public", "tool_calls")
    assert hermes.engine.generations[0].params.grammar is not None
    assert ("now" in grammar.source) == (choice == "required")


def test_strict_tools_are_a_grammar_and_go_with_a_response_format(hermes: Rig) -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    hermes.chat(tools=[strict])
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    assert hermes.chat(tools=[strict], response_format=schema).status_code == 200
    refused = hermes.chat(tools=[strict], structured_outputs={"regex": "a"})

    [(_, alone), (_, both)] = hermes.engine.compiled
    assert alone.kind == both.kind == "tool_calls"
    assert "%json" in json.loads(both.source)["rules"][0]
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "structured_outputs.regex")


def test_a_call_that_must_be_made_goes_with_no_other_grammar(hermes: Rig) -> None:
    refused = hermes.chat(tools=[WEATHER], tool_choice="required", guided_choice=["a"])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "guided_choice")


def test_a_schema_that_nothing_can_be_held_to_is_named(hermes: Rig) -> None:
    hermes.engine.refuse_grammar = InvalidGrammar("An answer cannot be held to 'not'.", keys=("not",))
    bad = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"not": {}}}}}}

    answer = hermes.chat(tools=[bad], tool_choice="required")

    assert answer.json()["error"]["param"] == "tools[0].function.parameters.properties.x.not"


def test_without_a_choice_none_is_told_of_and_none_is_read(hermes: Rig) -> None:
    [choice] = hermes.chat(tools=[WEATHER], tool_choice="none").json()["choices"]

    assert choice["message"]["content"] == CALL
    assert rendered(hermes)[1].tools == []


def test_earlier_turns_have_their_calls_as_objects(hermes: Rig) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}
    messages = [
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": None, "tool_calls": [{**call, "index": 0}], "reasoning_content": "Hm."},
        {"role": "tool", "tool_call_id": "call_1", "content": "12:00"},
    ]
    assert hermes.chat(messages=messages).status_code == 200

    given, _ = rendered(hermes)
    assert given[1]["tool_calls"] == [{**call, "function": {"name": "now", "arguments": {"zone": "UTC"}}}]
    assert given[1]["reasoning_content"] == "Hm."
    assert given[2] == {"role": "tool", "content": "12:00", "tool_call_id": "call_1"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].custom"),
        ({"tools": [{"type": "function", "function": {"name": "f", "deferred": True}}]}, "tools[0].function.deferred"),
        ({"tools": [WEATHER] * 129}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": "x" * 2**20}}]}, "tools"),
        ({"tools": [WEATHER], "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
            "tools[0].function.parameters",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [NOW]}]}, "messages[0].tool_calls"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
        ({"documents": [{"text": 5}]}, "documents[0].text"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"continue_final_message": True}, "continue_final_message"),
        (
            {
                "continue_final_message": True,
                "add_generation_prompt": True,
                "messages": [{"role": "assistant", "content": "a"}],
            },
            "add_generation_prompt",
        ),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
    ],
)
def test_what_does_not_fit_is_named(settings: Any, body: dict[str, Any], param: str) -> None:
    rig = Rig(settings.model_copy(update={"max_body": 2**22}))
    rig.engine.codec.form = HERMES
    answer = rig.chat(**body)

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


@pytest.mark.parametrize(
    ("form", "body", "param", "said"),
    [
        (ChatFormat(), {"tools": [WEATHER]}, "tools", "--tool-prompt"),
        (ChatFormat(takes_tools=True), {"tools": [WEATHER]}, "tools", "--tool-parser"),
        (
            ChatFormat(takes_tools=True, has_response_template=True),
            {"tools": [WEATHER], "tool_choice": "required"},
            "tool_choice",
            "auto",
        ),
        (ChatFormat(), {"documents": [{"title": "a", "text": "b"}]}, "documents", "message"),
        (
            ChatFormat(),
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]},
            "messages",
            "--tool-prompt",
        ),
    ],
)
def test_a_base_that_cannot_says_so(rig: Rig, form: ChatFormat, body: dict[str, Any], param: str, said: str) -> None:
    rig.engine.codec.form = form
    error = rig.chat(**body).json()["error"]

    assert error["param"] == param
    assert said in error["message"]


def test_the_tokenizers_own_reader_is_asked_where_it_has_one(hermes: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    hermes.engine.codec.form = ChatFormat(takes_tools=True, has_response_template=True)
    asked: list[str] = []

    def reader(prompt: str, tools: Any, *, only_one: bool) -> Any:
        asked.append(prompt)
        return Reading(syntax="hermes", tools=("get_weather",), only_one=only_one).reader()

    monkeypatch.setattr(hermes.engine.codec, "response_reader", reader)
    [choice] = hermes.chat(tools=[WEATHER]).json()["choices"]

    assert choice["finish_reason"] == "tool_calls"
    assert asked[0].endswith("[assistant]")
    assert not hermes.engine.generations[0].params.skip_special_tokens


# reasoning


@pytest.mark.parametrize("opening", ["", "<think>\n"])
def test_what_is_thought_is_beside_the_answer(hermes: Rig, opening: str) -> None:
    codec, engine = hermes.engine.codec, hermes.engine
    codec.form, codec.opening = THINKING, opening
    engine.text = ("" if opening else "<think>\n") + "Let me see.\n</think>\n\nYes."

    [choice] = hermes.chat().json()["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "Yes.",
        "refusal": None,
        "reasoning_content": "Let me see.",
    }
    deltas = [event["choices"][0]["delta"] for event in events(hermes.chat(stream=True).text)]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Let me see."
    assert "".join(delta.get("content") or "" for delta in deltas) == "Yes."
    [choice] = hermes.chat(include_reasoning=False).json()["choices"]
    assert "reasoning_content" not in choice["message"]


def test_what_is_thought_comes_before_what_an_answer_is_held_to(hermes: Rig) -> None:
    hermes.engine.codec.form, hermes.engine.codec.opening = THINKING, "<think>"
    hermes.chat(structured_outputs={"regex": "[ab]"})
    hermes.chat(tools=[WEATHER], tool_choice="required")

    assert [grammar.kind for _, grammar in hermes.engine.compiled] == ["after_thoughts"] * 2
    assert json.loads(hermes.engine.compiled[0][1].source) == {"mark": "</think>", "kind": "regex", "source": "[ab]"}


# the template


def test_the_template_gets_what_is_meant_for_it(hermes: Rig) -> None:
    hermes.chat(chat_template_kwargs={"enable_thinking": False}, documents=[{"title": "a", "text": "b"}])
    _, options = rendered(hermes)
    assert (options.variables, options.documents) == ({"enable_thinking": False}, [{"title": "a", "text": "b"}])
    assert options.for_answer

    hermes.chat(reasoning_effort="low")
    assert rendered(hermes)[1].variables == {"reasoning_effort": "low"}
    hermes.chat(reasoning_effort="none", chat_template_kwargs={"reasoning_effort": "x"})
    assert rendered(hermes)[1].variables == {"reasoning_effort": "x", "enable_thinking": False}


def test_a_message_is_gone_on_with_and_a_turn_is_not_begun(hermes: Rig) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer"}]
    hermes.chat(messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert rendered(hermes)[1].continue_final
    hermes.chat(add_generation_prompt=False)
    assert not rendered(hermes)[1].for_answer


# the official client


class Weather(BaseModel):
    """What the weather is in a city."""

    city: str


def test_openais_client_reads_calls_in_streams_too(hermes: Rig) -> None:
    hermes.engine.text = f"Hm. {CALL}"
    tool = openai.pydantic_function_tool(Weather, name="get_weather")
    with (
        served(hermes.app) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client,
        client.chat.completions.stream(
            model="base-model", messages=[{"role": "user", "content": "hi"}], tools=[tool]
        ) as stream,
    ):
        kinds = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message

    assert message.content == "Hm."
    assert message.tool_calls is not None
    [call] = message.tool_calls
    assert isinstance(call, ChatCompletionMessageFunctionToolCall)
    assert call.function.parsed_arguments == Weather(city="Paris")
    assert "tool_calls.function.arguments.done" in kinds


def test_a_schema_that_a_notation_cannot_hold_is_refused_with_its_place(rig: Rig) -> None:
    rig.engine.codec.form = ChatFormat(takes_tools=True, syntax="qwen3_coder")
    properties = {"x": {"type": "string", "pattern": "a"}}
    function = {"name": "f", "strict": True, "parameters": {"type": "object", "properties": properties}}

    error = rig.chat(tools=[{"type": "function", "function": function}]).json()["error"]

    assert error["param"] == "tools[0].function.parameters.properties.x.pattern"
    assert "'x'" in error["message"]
    function["strict"] = False
    assert rig.chat(tools=[{"type": "function", "function": function}], tool_choice="required").status_code == 200


def test_arguments_written_as_text_become_what_their_schema_says(rig: Rig) -> None:
    rig.engine.codec.form = ChatFormat(takes_tools=True, syntax="qwen3_coder")
    properties = {"code": {"type": "string"}, "days": {"type": ["integer", "null"]}}
    function = {"name": "f", "parameters": {"type": "object", "properties": properties}}
    values = "".join(f"<parameter={name}>\n12\n</parameter>\n" for name in properties)
    rig.engine.text = f"<tool_call>\n<function=f>\n{values}</function>\n</tool_call>"
    rig.engine.context_length = 1000

    [choice] = rig.chat(tools=[{"type": "function", "function": function}], max_tokens=500).json()["choices"]

    [call] = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"code": "12", "days": 12}
    assert choice["finish_reason"] == "tool_calls"
