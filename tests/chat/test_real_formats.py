"""How the templates of well-known families write calls and thoughts: told from the template, and read from an answer.

Each line of `FAMILIES` has what of a family's own template says so, as that spells it, and an answer as its models
write it.
"""

import json
from typing import Any

import pytest

from manylora.chat.format import Syntax, reasoning_of, syntax_of
from manylora.chat.pieces import Arguments, CallStart, Reasoning, Text, joined
from manylora.chat.reading import Reading

OSLO = ("get_weather", {"city": "Oslo", "days": 2})
NOW: tuple[str, Any] = ("now", {})
HERMES = '{{- \'\\n<tool_call>\\n{"name": "\' }}{{- tool_call.name }}{{- \'", "arguments": \' }}'
FAMILIES: dict[str, tuple[str, Syntax | None, str, list[tuple[str, Any]], str, str]] = {
    "Qwen 2.5": (
        HERMES,
        "hermes",
        'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        [OSLO, NOW],
        "I look.",
        "",
    ),
    "Qwen 3": (
        HERMES + "{%- if '</think>' in content %}{{- '<think>\\n' }}{%- endif %}",
        "hermes",
        "<think>\nWhere is that?\n</think>\n\n<tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>',
        [OSLO],
        "",
        "Where is that?",
    ),
    "Hermes 2 Pro": (
        '{{ \'<tool_call>\' }}{"arguments": <args-dict>, "name": <function-name>}',
        "hermes",
        '<tool_call>\n{"arguments": {"city": "Oslo", "days": 2}, "name": "get_weather"}\n</tool_call>',
        [OSLO],
        "",
        "",
    ),
    "Qwen 3 Coder": (
        "{{- '<tool_call>\\n<function=' + tool_call.name + '>\\n' }}{{- '<parameter=' + args_name + '>\\n' }}",
        "qwen3_coder",
        "I look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n2\n"
        "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        [OSLO, NOW],
        "I look.",
        "",
    ),
    "GLM 4.5": ("{{- '<tool_call>' + tc.name }}<arg_key>{{ k }}</arg_key>", None, "", [], "", ""),
    "Llama 3.1": (
        "{%- set tool_call = message.tool_calls[0].function %}{{- '{\"name\": \"' + tool_call.name + '\", ' }}"
        "{{- '\"parameters\": ' }}{{- tool_call.arguments | tojson }}",
        "llama3_json",
        '{"name": "get_weather", "parameters": {"city": "Oslo", "days": 2}}',
        [OSLO],
        "",
        "",
    ),
    "Llama 3.2, in Python": (
        "format of [func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]",
        "pythonic",
        "[get_weather(city='Oslo', days=2), now()]",
        [OSLO, NOW],
        "",
        "",
    ),
    "Llama 4": (
        "- Use exact format: [func_name1(param1=value1, param2=value2), func_name2(...)]",
        "pythonic",
        '[get_weather(city="Oslo", days=2)]',
        [OSLO],
        "",
        "",
    ),
    "Mistral 7B v0.3, Small 3": (
        "{{- '[TOOL_CALLS] [' }}{{- out[:-1] }}{{- ', \"id\": \"' + tool_call.id[-9:] + '\"}' }}",
        "mistral",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}, "id": "a1B2c3D4e"}, '
        '{"name": "now", "arguments": {}}]',
        [OSLO, NOW],
        "",
        "",
    ),
    "Mistral Small 3.2, Magistral": (
        "{{- '[THINK]' }}{{- '[/THINK]' }}{{- '[TOOL_CALLS]' + name + '[CALL_ID]' + id + '[ARGS]' + arguments }}",
        "mistral_args",
        '[THINK]Where?[/THINK][TOOL_CALLS]get_weather[CALL_ID]a1B2c3D4e[ARGS]{"city": "Oslo", "days": 2}'
        "[TOOL_CALLS]now[ARGS]{}",
        [OSLO, NOW],
        "",
        "Where?",
    ),
    "DeepSeek R1, V3": (
        "{{'<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\\n```json\\n'}}"
        "{{content.split('</think>')[-1]}}",
        "deepseek_v3",
        "<think>\nEasy.\n</think>\n\nI look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>"
        'get_weather\n```json\n{"city": "Oslo", "days": 2}\n```<｜tool▁call▁end｜>\n'
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        [OSLO, NOW],
        "I look.",
        "Easy.",
    ),
    "DeepSeek V3.1": (
        "{{'<｜tool▁call▁begin｜>'+ tool['function']['name'] + '<｜tool▁sep｜>' + tool['function']['arguments']}}",
        "deepseek_v31",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Oslo", "days": 2}'
        "<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        [OSLO, NOW],
        "",
        "",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_cut", [False, True])
def test_answers_of_a_family_are_read_as_its_template_writes_them(family: str, is_cut: bool) -> None:
    template, syntax, answer, calls, said, thought = FAMILIES[family]
    assert syntax_of(template) == syntax
    reasoning = reasoning_of(template, ())
    assert (reasoning is not None) == bool(thought)

    reader = Reading(reasoning=reasoning, syntax=syntax, tools=("get_weather", "now")).reader()
    parts = list(answer) if is_cut else [answer]
    pieces = joined([*(piece for part in parts for piece in reader.add(part)), *reader.end()])

    starts = [piece for piece in pieces if isinstance(piece, CallStart)]
    texts = ["".join(p.text for p in pieces if isinstance(p, Arguments) and p.index == s.index) for s in starts]
    assert [(start.name, json.loads(text)) for start, text in zip(starts, texts, strict=True)] == calls
    assert "".join(piece.text for piece in pieces if isinstance(piece, Text)) == said
    assert "".join(piece.text for piece in pieces if isinstance(piece, Reasoning)).strip() == thought
