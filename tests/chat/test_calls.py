"""Answers split into text, reasoning and calls, whatever notation they are in and however they are cut."""

import json
import string
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from manylora.chat.format import Syntax
from manylora.chat.literals import parse_call
from manylora.chat.pieces import Arguments, CallStart, Piece, Reasoning, Text, joined
from manylora.chat.reading import Reading

SYNTAXES: tuple[Syntax, ...] = (
    *("hermes", "llama3_json", "mistral", "mistral_args", "pythonic"),
    *("deepseek_v3", "deepseek_v31", "qwen3_coder"),
)
TOOLS = ("get_weather", "now")
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "code": {"$ref": "#/$defs/Code"},
        "last": {"anyOf": [{"$ref": "#/$defs/Code"}, {"type": "null"}]},
    },
    "$defs": {"Code": {"type": "string"}},
}
THINK = ("<think>", "</think>")


def reading(syntax: Syntax | None, **more: Any) -> Reading:
    return Reading(syntax=syntax, tools=TOOLS, schemas={"get_weather": CITY}, **more)


def read(reading: Reading, *parts: str) -> list[Piece]:
    """All pieces of an answer that comes in these parts, ids left out."""
    reader = reading.reader()
    pieces = [*(piece for part in parts for piece in reader.add(part)), *reader.end()]
    return [CallStart(p.index, "", p.name) if isinstance(p, CallStart) else p for p in joined(pieces)]


def calls(pieces: list[Piece]) -> list[tuple[str, Any]]:
    starts = [piece for piece in pieces if isinstance(piece, CallStart)]
    texts = ["".join(p.text for p in pieces if isinstance(p, Arguments) and p.index == s.index) for s in starts]
    return [(start.name, json.loads(text)) for start, text in zip(starts, texts, strict=True)]


def said(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, Text))


PARIS = ("get_weather", {"city": "Paris"})
NOW: tuple[str, Any] = ("now", {})


@pytest.mark.parametrize(
    ("syntax", "text", "found", "rest"),
    [
        ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>', [PARIS], ""),
        ("hermes", 'I look.\n<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}</tool_call>\n',
         [PARIS], "I look."),
        ("hermes", '<tool_call>{"name": "now"}</tool_call>\n<tool_call>{"name": "now", "arguments": null}</tool_call>',
         [NOW, NOW], ""),
        ("hermes", '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}}</tool_call> Done.',
         [PARIS], "Done."),
        ("hermes", '<tool_call>{"name": "now", "arguments": {}} and more', [NOW], "and more"),
        ("hermes", '<tool_call>{"name": "other", "arguments": {}}</tool_call>', [],
         '<tool_call>{"name": "other", "arguments": {}}</tool_call>'),
        ("hermes", "a < b <tool_ <tool_call> is a tag", [], "a < b <tool_ <tool_call> is a tag"),
        ("hermes", '<tool_call>{"name": "now", "arguments": {}, oh</tool_call>text', [NOW], "text"),
        ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Paris"}}', [PARIS], ""),
        ("llama3_json", '{"type": "function", "name": "now", "parameters": {}}; {"name": "now", "parameters": {}}',
         [NOW, NOW], ""),
        ("llama3_json", '<|python_tag|>{"name": "now", "parameters": {}}', [NOW], ""),
        ("llama3_json", '{"answer": 42}', [], '{"answer": 42}'),
        ("llama3_json", 'In JSON: {"name": "now", "parameters": {}}', [], 'In JSON: {"name": "now", "parameters": {}}'),
        ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "now"}]',
         [PARIS, NOW], ""),
        ("mistral_args", '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]now[CALL_ID]a1[ARGS]{}',
         [PARIS, NOW], ""),
        ("mistral_args", 'Hm. [TOOL_CALLS]now{}', [NOW], "Hm."),
        ("mistral_args", "[TOOL_CALLS]other[ARGS]{}", [], "[TOOL_CALLS]other[ARGS]{}"),
        ("pythonic", "[get_weather(city='Paris'), now()]", [PARIS, NOW], ""),
        ("pythonic", '[get_weather(city="P]a)r\\"is", days=[1, {"a": None}])]',
         [("get_weather", {"city": 'P]a)r"is', "days": [1, {"a": None}]})], ""),
        ("pythonic", "[1, 2, 3]", [], "[1, 2, 3]"),
        ("pythonic", "[now(1)]", [], "[now(1)]"),
        ("pythonic", "See [now()]", [], "See [now()]"),
        ("deepseek_v3", "Hm.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
         '{"city": "Paris"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```'
         "<｜tool▁call▁end｜><｜tool▁calls▁end｜>", [PARIS, NOW], "Hm."),
        ("deepseek_v31", '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}'
         "<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜> Done.",
         [PARIS, NOW], "Done."),
        ("deepseek_v31", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call", [NOW], ""),
        ("deepseek_v31", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{} and", [NOW], "and"),
        ("deepseek_v31", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>other<｜tool▁sep｜>{}", [],
         "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>other<｜tool▁sep｜>{}"),
        ("deepseek_v31", '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}'
         "<｜tool▁call▁end｜>Done.", [PARIS], "Done."),
        ("deepseek_v3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```"
         "<｜tool▁call▁end｜>\n```py\nDone.", [NOW], "```py\nDone."),
        ("deepseek_v3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```\nDone.",
         [NOW], "Done."),
        ("deepseek_v3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}"
         "<｜tool▁call▁end｜>```py", [NOW], "```py"),
        ("deepseek_v31", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
         "<｜tool▁call▁begin｜>other<｜tool▁sep｜>{}", [NOW], "<｜tool▁call▁begin｜>other<｜tool▁sep｜>{}"),
        ("deepseek_v31", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>"
         '{"a": "<｜tool▁call▁end｜>```"}<｜tool▁calls▁end｜>', [("now", {"a": "<｜tool▁call▁end｜>```"})], ""),
        ("deepseek_v31", "<｜tool▁calls▁begin｜><｜tool▁calls▁end｜>", [],
         "<｜tool▁calls▁begin｜><｜tool▁calls▁end｜>"),
        ("deepseek_v3", "<｜tool▁calls▁begin｜> is a mark", [], "<｜tool▁calls▁begin｜> is a mark"),
        ("qwen3_coder", "I look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
         "</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>", [PARIS, NOW], "I look."),
        ("qwen3_coder", "<tool_call><function=get_weather><parameter=city>7</parameter><parameter=days>\n7\n"
         "</parameter><parameter=days>8</parameter></function></tool_call> Done.",
         [("get_weather", {"city": "7", "days": 7})], "Done."),
        ("qwen3_coder", "<tool_call><function=get_weather><parameter=city>\n\n</b>\n</par\"\n\n</parameter></function>",
         [("get_weather", {"city": '\n</b>\n</par"\n'})], ""),
        ("qwen3_coder", "<tool_call><function=now><parameter=a>\n[1, null]\n</parameter><parameter=b>True</parameter>"
         "<parameter=c>NaN</parameter><parameter=d>x y</parameter></function></tool_call>",
         [("now", {"a": [1, None], "b": True, "c": "NaN", "d": "x y"})], ""),
        ("qwen3_coder", "<tool_call><function=now><parameter=a>1e999</parameter><parameter=b>[-1e400]</parameter>"
         "</function></tool_call>", [("now", {"a": "1e999", "b": "[-1e400]"})], ""),
        ("qwen3_coder", "<tool_call><function=get_weather><parameter=code>7</parameter><parameter=last>\n8\n"
         "</parameter></function></tool_call>", [("get_weather", {"code": "7", "last": "8"})], ""),
        ("qwen3_coder", "<tool_call><function=now><parameter=a>1</parameter>oh</function></tool_call>text",
         [("now", {"a": 1})], "text"),
        ("qwen3_coder", "<tool_call><function=other></function></tool_call>", [],
         "<tool_call><function=other></function></tool_call>"),
        ("qwen3_coder", '<tool_call>{"name": "now"}</tool_call>', [], '<tool_call>{"name": "now"}</tool_call>'),
    ],
)  # fmt: skip
def test_calls_are_found_and_what_is_none_stays_text(
    syntax: Syntax, text: str, found: list[tuple[str, Any]], rest: str
) -> None:
    pieces = read(reading(syntax), text)

    assert calls(pieces) == found
    assert said(pieces) == rest


@pytest.mark.parametrize(
    ("syntax", "broken", "begun"),
    [
        ("deepseek_v31", "now<｜tool▁sep｜>{{CUT}}<｜tool▁call▁end｜>", ""),
        ("deepseek_v31", "now<｜tool▁sep｜>{{CUT}}", ""),
        ("deepseek_v3", "function<｜tool▁sep｜>now\n```json\n{{CUT}}\n```<｜tool▁call▁end｜>\n", "\n"),
    ],
)  # fmt: skip
def test_a_call_that_is_not_whole_ends_at_its_mark(syntax: Syntax, broken: str, begun: str) -> None:
    cut = '{"a": 1, "b": [<"c<'
    text = (
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{broken.replace('{{CUT}}', cut + chr(34))}"
        '<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>Done.'
    )

    pieces = read(reading(syntax), text)

    arguments = ["".join(p.text for p in pieces if isinstance(p, Arguments) and p.index == at) for at in range(2)]
    assert [piece.name for piece in pieces if isinstance(piece, CallStart)] == ["now", "get_weather"]
    assert arguments == [f'{cut}"{begun}', '{"city": "Paris"}']
    assert said(pieces) == "Done."


MARKS = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<think>", "</think>",
    '{"name": "now", "arguments": {}}', '{"name": "get_weather", "parameters": {"city": "Pa', 'ris"}}', "now()",
    "[now(", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "function<｜tool▁sep｜>", "now<｜tool▁sep｜>",
    "\n```json\n", "\n```", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<function=now>", "<function=get_weather>",
    "<parameter=city>", "<parameter=a>", "</parameter>", "</function>", "<", "</",
    "a='x', ", ")]", "{", "}", "[", "]", "(", ")", '"', "'", "\\", ",", ";", ":", " ", "\n", "name", "now", "é你",
]  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(MARKS), st.text(max_size=4)), max_size=14)


@pytest.mark.parametrize("syntax", [*SYNTAXES, None])
@given(parts=TEXTS, cuts=st.sets(st.integers(0, 200), max_size=6), is_thinking=st.booleans(), only_one=st.booleans())
@example(parts=["<tool_call>", '{"name": "now", "arguments": {}}', "</tool_call>"], cuts={3, 20}, is_thinking=False,
         only_one=False)  # fmt: skip
@example(parts=["<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "now<｜tool▁sep｜>", "{", "}", "<｜tool▁call▁"],
         cuts={3, 30}, is_thinking=False, only_one=True)  # fmt: skip
@example(parts=["<tool_call>", "<function=get_weather>", "<parameter=city>", "\n", "</", "</parameter>", "</function>"],
         cuts={12, 55}, is_thinking=False, only_one=False)  # fmt: skip
def test_any_text_is_read_and_where_it_is_cut_makes_no_difference(
    syntax: Syntax | None, parts: list[str], cuts: set[int], is_thinking: bool, only_one: bool
) -> None:
    text = "".join(parts)
    places = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    cut = [text[start:end] for start, end in pairwise(places)]
    rules = reading(syntax, reasoning=THINK, is_thinking=is_thinking, only_one=only_one)

    whole = read(rules, text)

    assert read(rules, *cut) == whole
    assert read(rules, *text) == whole
    if only_one:
        assert sum(isinstance(piece, CallStart) for piece in whole) <= 1
    if syntax is None:
        for kind in (Text, Reasoning):
            found = "".join(piece.text for piece in whole if isinstance(piece, kind))
            assert "".join(found.split()) in "".join(text.split())


@given(
    syntax=st.sampled_from(SYNTAXES),
    arguments=st.dictionaries(
        st.text(string.ascii_lowercase, min_size=1, max_size=5),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(-99, 99), st.text(max_size=8)),
            lambda inner: st.one_of(
                st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
            ),
            max_leaves=6,
        ),
        max_size=3,
    ),
)
def test_arguments_come_through_whatever_they_are(syntax: Syntax, arguments: dict[str, Any]) -> None:
    text = json.dumps(arguments)
    written = {
        "hermes": f'<tool_call>{{"name": "now", "arguments": {text}}}</tool_call>',
        "llama3_json": f'{{"name": "now", "parameters": {text}}}',
        "mistral": f'[TOOL_CALLS][{{"name": "now", "arguments": {text}}}]',
        "mistral_args": f"[TOOL_CALLS]now[ARGS]{text}",
        "pythonic": f"[now({', '.join(f'{name}={value!r}' for name, value in arguments.items())})]",
        "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n"
        f"{text}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "deepseek_v31": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{text}<｜tool▁call▁end｜>",
        "qwen3_coder": "<tool_call>\n<function=now>\n"
        + "".join(
            f"<parameter={name}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
            for name, value in arguments.items()
        )
        + "</function>\n</tool_call>",
    }[syntax]
    schema = {"properties": {name: {"type": "string"} for name, value in arguments.items() if isinstance(value, str)}}

    rules = Reading(syntax=syntax, tools=TOOLS, schemas={"now": schema})
    assert calls(read(rules, written)) == [("now", arguments)]


@pytest.mark.parametrize(
    ("is_thinking", "text", "thought", "rest"),
    [
        (False, "<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
        (False, "\n<think>Hm.", "Hm.", ""),
        (False, "Yes <think>no</think>", "", "Yes <think>no</think>"),
        (True, "Hm. </thin k></think> Yes.", "Hm. </thin k>", "Yes."),
        (True, "Hm.", "Hm.", ""),
        (False, "", "", ""),
    ],
)
def test_what_is_thought_is_split_off(is_thinking: bool, text: str, thought: str, rest: str) -> None:
    pieces = read(Reading(reasoning=THINK, is_thinking=is_thinking), text)

    assert "".join(piece.text for piece in pieces if isinstance(piece, Reasoning)) == thought
    assert said(pieces) == rest


def test_arguments_are_passed_on_while_they_are_written() -> None:
    reader = reading("hermes").reader()

    assert reader.add('<tool_call>{"name": "get_weather"')[-1:] != []
    assert list(reader.add(', "arguments": {"city": "Pa')) == [Arguments(0, '{"city": "Pa')]
    assert list(reader.add('ris"')) == [Arguments(0, 'ris"')]


@given(st.text(st.sampled_from("now(a=1,[]{}'\"\\:.- TrueNone\n"), max_size=40))
def test_no_text_makes_the_parser_of_literals_raise_anything_else(text: str) -> None:
    try:
        name, arguments = parse_call(text)
    except ValueError:
        return
    assert name
    assert json.loads(json.dumps(arguments)) == arguments


@pytest.mark.parametrize("text", ["f(a=" + "[" * 10_000, "f(a=" + "9" * 5000 + ")", "f(a=1e999)", "f(a={[1]: 2})"])
def test_literals_have_bounds(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - whatever is said
        parse_call(text)
