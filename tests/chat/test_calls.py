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

SYNTAXES: tuple[Syntax, ...] = ("hermes", "llama3_json", "mistral", "mistral_args", "pythonic")
TOOLS = ("get_weather", "now")
THINK = ("<think>", "</think>")


def reading(syntax: Syntax | None, **more: Any) -> Reading:
    return Reading(syntax=syntax, tools=TOOLS, **more)


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
    ],
)  # fmt: skip
def test_calls_are_found_and_what_is_none_stays_text(
    syntax: Syntax, text: str, found: list[tuple[str, Any]], rest: str
) -> None:
    pieces = read(reading(syntax), text)

    assert calls(pieces) == found
    assert said(pieces) == rest


MARKS = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<think>", "</think>",
    '{"name": "now", "arguments": {}}', '{"name": "get_weather", "parameters": {"city": "Pa', 'ris"}}', "now()",
    "[now(",
    "a='x', ", ")]", "{", "}", "[", "]", "(", ")", '"', "'", "\\", ",", ";", ":", " ", "\n", "name", "now", "é你",
]  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(MARKS), st.text(max_size=4)), max_size=14)


@pytest.mark.parametrize("syntax", [*SYNTAXES, None])
@given(parts=TEXTS, cuts=st.sets(st.integers(0, 200), max_size=6), is_thinking=st.booleans(), only_one=st.booleans())
@example(parts=["<tool_call>", '{"name": "now", "arguments": {}}', "</tool_call>"], cuts={3, 20}, is_thinking=False,
         only_one=False)  # fmt: skip
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
    if not any(isinstance(piece, CallStart) for piece in whole) and syntax is None and not is_thinking:
        said_or_thought = "".join(p.text for p in whole if not isinstance(p, CallStart))
        assert "".join(said_or_thought.split()) in "".join(text.split())


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
    }[syntax]

    assert calls(read(reading(syntax), written)) == [("now", arguments)]


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
