"""Calls that must be made: whatever a model likes, what it writes is read as calls of the tools, with their schemas."""

import json
import random
from functools import cache
from typing import Any

import jsonschema
import llguidance
import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from manylora.chat.format import Syntax
from manylora.chat.holding import CallRules, HeldTool
from manylora.chat.pieces import Arguments, CallStart, Piece, Text
from manylora.chat.reading import Reading
from manylora.errors import InvalidGrammar
from manylora.grammars.grammar import Grammar
from manylora.grammars.language import in_library_notation, mask_words, new_matcher
from manylora.grammars.vocabulary import Vocabulary
from tests.tiny_models import make_tokenizer

SYNTAXES: tuple[Syntax, ...] = (
    *("hermes", "llama3_json", "mistral", "mistral_args", "pythonic"),
    *("deepseek_v3", "deepseek_v31", "qwen3_coder"),
)
SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {"unit": {"enum": ["c", "f"]}, "city": {"type": "string", "maxLength": 4}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "now": {"type": "object", "properties": {"utc": {"type": "boolean"}}, "additionalProperties": False},
}
THINK = ("<think>", "</think>")
ANSWER = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}
MOST_STEPS = 400


@cache
def tokenizer(has_marks: bool) -> PreTrainedTokenizerBase:
    """With tokens for the marks, or with marks that are plain text."""
    made = make_tokenizer()
    if has_marks:
        deepseek = ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")
        plain = ["<tool_call>", "</tool_call>", *THINK, *(f"<｜tool▁{name}｜>" for name in deepseek)]
        made.add_tokens([AddedToken(mark, special=False) for mark in plain])
        made.add_tokens([AddedToken(mark, special=True) for mark in ("[TOOL_CALLS]", "[ARGS]")], special_tokens=True)
    return made


@cache
def library(has_marks: bool) -> llguidance.LLTokenizer:
    made = tokenizer(has_marks)
    return Vocabulary(made.backend_tokenizer.to_str(), len(made), (made.eos_token_id,)).build()


def written(grammar: Grammar, seed: int, has_marks: bool) -> str | None:
    """What a model writes that likes any token as well as any other; None where it does not come to an end."""
    tokens, made, rng = library(has_marks), tokenizer(has_marks), random.Random(seed)
    matcher = new_matcher(tokens, in_library_notation(grammar.kind, grammar.source, tokens))
    words = np.zeros(mask_words(tokens), np.uint32)
    ids: list[int] = []
    for _ in range(MOST_STEPS):
        assert not matcher.get_error()
        if matcher.is_stopped():
            return str(made.decode([token_id for token_id in ids if token_id != made.eos_token_id]))
        forced = matcher.compute_ff_tokens()
        if not forced:
            matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
            ends = made.eos_token_id in allowed and rng.random() < 0.2
            marks = [token_id for token_id in allowed if token_id >= len(tokenizer(False))]
            forced = [made.eos_token_id if ends else rng.choice(marks if marks and rng.random() < 0.2 else allowed)]
        matcher.consume_tokens(forced)
        ids += forced
    return None


def takes(grammar: Grammar, answer: str) -> bool:
    """Whether a model that is held to the grammar may write this and nothing more."""
    matcher = new_matcher(library(False), in_library_notation(grammar.kind, grammar.source, library(False)))
    assert not matcher.get_error()
    ids = tokenizer(False).encode(answer, add_special_tokens=False)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


def calls(pieces: list[Piece]) -> list[tuple[str, Any]]:
    starts = [piece for piece in pieces if isinstance(piece, CallStart)]
    texts = ["".join(p.text for p in pieces if isinstance(p, Arguments) and p.index == s.index) for s in starts]
    return [(start.name, json.loads(text)) for start, text in zip(starts, texts, strict=True)]


@pytest.mark.parametrize("only_one", [False, True])
@pytest.mark.parametrize("must_call", [False, True])
@pytest.mark.parametrize(  # letter by letter, nobody who writes at random comes to the mark behind the thoughts
    ("has_marks", "is_thinking"), [(False, False), (True, False), (True, True)]
)
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_every_answer_is_read_as_what_it_had_to_be(
    syntax: Syntax, has_marks: bool, must_call: bool, only_one: bool, is_thinking: bool
) -> None:
    tools = [HeldTool(name, schema, is_lenient=False) for name, schema in SCHEMAS.items()]
    held = CallRules(tools, must_call=must_call, only_one=only_one).grammar(syntax)
    grammar = Grammar.after_thoughts(THINK[1], held) if is_thinking else held
    rules = Reading(THINK, is_thinking, syntax, tuple(SCHEMAS), schemas=SCHEMAS)
    answers = [text for seed in range(4) if (text := written(grammar, seed, has_marks)) is not None]
    assert answers

    for answer in answers:
        reader = rules.reader()
        pieces = [*reader.add(answer), *reader.end()]
        for name, arguments in calls(pieces):
            jsonschema.validate(arguments, SCHEMAS[name])
        if must_call:
            assert calls(pieces), answer
            assert not any(isinstance(piece, Text) for piece in pieces), answer
        if only_one:
            assert len(calls(pieces)) <= 1, answer


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_text_beside_strict_tools_can_have_a_schema_of_its_own(syntax: Syntax) -> None:
    tools = [HeldTool("now", SCHEMAS["now"], is_lenient=False)]
    text_schema = Grammar.json_schema(ANSWER).source
    held = CallRules(tools, must_call=False, only_one=True, text_schema=text_schema).grammar(syntax)
    answers = {text for seed in range(12) if (text := written(held, seed, True)) is not None}
    kinds = set()

    for answer in answers:
        reader = Reading(syntax=syntax, tools=("now",)).reader()
        pieces = [*reader.add(answer), *reader.end()]
        kinds.add(bool(calls(pieces)))
        if not calls(pieces):
            jsonschema.validate(json.loads(answer), ANSWER)

    assert False in kinds


def test_a_tool_whose_schema_cannot_be_held_to_is_held_as_far_as_it_goes() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "string", "maxLength": 2, "not": {"const": "y"}}}}
    strict = CallRules([HeldTool("f", schema, is_lenient=False)], must_call=True, only_one=True).grammar("hermes")
    lenient = CallRules([HeldTool("f", schema, is_lenient=True)], must_call=True, only_one=True).grammar("hermes")

    found = [
        new_matcher(library(True), in_library_notation(each.kind, each.source, library(True))).get_error()
        for each in (strict, lenient)
    ]

    assert "not" in found[0]
    assert not found[1]


def test_a_string_without_quotes_is_held_to_what_a_text_can_be_held_to() -> None:
    properties = {
        "color": {"enum": ["r", "</parameter>", "b"]},
        "size": {"const": "xl"},
        "note": {"type": "string", "minLength": 2, "maxLength": 3, "description": "A note"},
        "count": {"$ref": "#/$defs/count"},
    }
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    schema |= {"$defs": {"count": {"type": "integer", "minimum": 1, "maximum": 3}}}
    held = CallRules([HeldTool("f", schema, is_lenient=False)], must_call=True, only_one=True).grammar("qwen3_coder")
    answers = [text for seed in range(40) if (text := written(held, seed, True)) is not None]
    assert answers

    for answer in answers:
        reader = Reading(syntax="qwen3_coder", tools=("f",), schemas={"f": schema}).reader()
        [(_, arguments)] = calls([*reader.add(answer), *reader.end()])
        jsonschema.validate(arguments, schema)


def test_a_string_without_quotes_ends_at_its_tag_alone() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    held = CallRules([HeldTool("f", schema, is_lenient=False)], must_call=True, only_one=True).grammar("qwen3_coder")

    assert takes(held, call("qwen3_coder", {"a": '7 <b>\n"</b>\n\n</par'}))
    assert not takes(held, call("qwen3_coder", {"a": "7</parameter>7"}))


def test_a_pattern_of_a_string_without_quotes_is_refused_unless_it_is_lenient() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "string", "maxLength": 2, "pattern": "y"}}}

    with pytest.raises(InvalidGrammar) as refused:
        CallRules([HeldTool("f", schema, is_lenient=False)], must_call=True, only_one=True).grammar("qwen3_coder")

    assert refused.value.keys == ("pattern",)
    lenient = CallRules([HeldTool("f", schema, is_lenient=True)], must_call=True, only_one=True).grammar("qwen3_coder")
    assert written(lenient, 0, True) is not None


CITY_OR_CODE: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "code": {"$ref": "#/$defs/Code"}, "at": {"$ref": "#/$defs/Point"}},
    "required": ["name", "at"],
    "additionalProperties": False,
    "$defs": {
        "Code": {"type": "string", "maxLength": 5},
        "Point": {
            "type": "object",
            "properties": {"x": {"type": "integer"}},
            "required": ["x"],
            "additionalProperties": False,
        },
    },
}
BEHIND: dict[str, Any] = {
    "$ref": "#/$defs/All",
    "$defs": {**CITY_OR_CODE["$defs"], "All": {**CITY_OR_CODE, "$defs": {}}},
}
UNNAMED: dict[str, Any] = {"type": "object", "required": ["at"]}
OPEN: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "string"}}
EITHER: dict[str, Any] = {"type": "object", "properties": {}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}


@pytest.mark.parametrize("schema", [CITY_OR_CODE, BEHIND], ids=["models", "a model"])
@pytest.mark.parametrize(
    ("syntax", "right", "wrong"),
    [
        (
            "qwen3_coder",
            {"name": "7", "at": '{"x": 1}', "code": "94110"},
            {"name": "7", "at": '{"x": 1}', "code": "94110-"},
        ),
        (
            "pythonic",
            {"name": '"7"', "at": '{"x": 1}', "code": '"94110"'},
            {"name": '"7"', "at": '{"x": 1}', "code": "94110"},
        ),
    ],
)
def test_arguments_are_held_to_the_models_that_they_refer_to(
    schema: dict[str, Any], syntax: Syntax, right: dict[str, str], wrong: dict[str, str]
) -> None:
    held = CallRules([HeldTool("f", schema, is_lenient=False)], must_call=True, only_one=True).grammar(syntax)

    assert takes(held, call(syntax, right))
    assert not takes(held, call(syntax, wrong))
    assert not takes(held, call(syntax, {"at": right["at"]}))
    reader = Reading(syntax=syntax, tools=("f",), schemas={"f": schema}).reader()
    found = calls([*reader.add(call(syntax, right)), *reader.end()])
    assert found == [("f", {"name": "7", "at": {"x": 1}, "code": "94110"})]


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"x": {"type": "integer"}}, "required": ["x"]},
        {"anyOf": [{"properties": {"x": {"type": "integer"}}, "required": ["x"]}, {"type": "null"}]},
        {"$ref": "#/$defs/it", "$defs": {"it": {"properties": {"x": {"type": "integer"}}, "required": ["x"]}}},
    ],
)
def test_arguments_are_an_object_whether_their_schema_says_it_or_not(schema: dict[str, Any]) -> None:
    held = CallRules([HeldTool("f", schema, is_lenient=False)], must_call=True, only_one=True).grammar("hermes")
    found = {
        arguments: takes(held, f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>')
        for arguments in ('{"x": 5}', '{"x": "a"}', "5", '"a"', "null")
    }
    assert found == {'{"x": 5}': True, '{"x": "a"}': False, "5": False, '"a"': False, "null": False}


def call(syntax: Syntax, arguments: dict[str, str]) -> str:
    """A call of `f` in a notation that has each argument by itself."""
    if syntax == "pythonic":
        return f"[f({', '.join(f'{name}={value}' for name, value in arguments.items())})]"
    parts = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in arguments.items())
    return f"<tool_call>\n<function=f>\n{parts}</function>\n</tool_call>"


@pytest.mark.parametrize("syntax", ["qwen3_coder", "pythonic"])
def test_arguments_that_no_schema_names_can_be_given(syntax: Syntax) -> None:
    def held(schema: dict[str, Any], *, is_lenient: bool) -> Grammar:
        tool = HeldTool("f", schema, is_lenient=is_lenient)
        return CallRules([tool], must_call=True, only_one=True).grammar(syntax)

    needed = held(UNNAMED, is_lenient=False)
    assert takes(needed, call(syntax, {"at": "[1]"}))
    assert not takes(needed, call(syntax, {}))
    for schema in (UNNAMED, OPEN, EITHER, {"type": "object"}):
        assert takes(held(schema, is_lenient=True), call(syntax, {"at": "[1]", "a": '"x y"', "b_1": "7"}))
    for schema in ({"type": "object", "properties": {}}, {"type": "object", "additionalProperties": False}):
        assert not takes(held(schema, is_lenient=True), call(syntax, {"at": "[1]"}))


@pytest.mark.parametrize("syntax", ["qwen3_coder", "pythonic"])
@pytest.mark.parametrize(
    ("schema", "is_lenient", "key"),
    [
        (OPEN, False, "additionalProperties"),
        (EITHER, False, "anyOf"),
        ({**UNNAMED, "additionalProperties": False}, False, "required"),
        ({"type": "array"}, False, "type"),
        ({"properties": [1]}, True, "properties"),
        ({"required": 1}, True, "required"),
    ],
)
def test_what_is_said_of_all_arguments_together_is_refused_where_each_is_held_by_itself(
    syntax: Syntax, schema: dict[str, Any], is_lenient: bool, key: str
) -> None:
    with pytest.raises(InvalidGrammar, match=key) as refused:
        CallRules([HeldTool("f", schema, is_lenient=is_lenient)], must_call=True, only_one=True).grammar(syntax)

    assert key in refused.value.keys
