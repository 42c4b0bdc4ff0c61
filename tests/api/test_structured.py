"""The fields that say what an answer must look like: which grammar each asks for, and how a fault is named."""

import json
from typing import Any

import pytest

from manylora.engine.interface import Grammar, Whitespace
from manylora.errors import InvalidGrammar, QueueFull
from tests.api.conftest import Rig
from tests.api.fakes import FakeCompiled

SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}, "required": ["a"]}
STRUCTURES = [{"begin": "<call>", "schema": SCHEMA, "end": "</call>"}]
TAG = {"structures": STRUCTURES, "triggers": ["<call"]}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}
SOME, NONE = Whitespace(), Whitespace(is_none=True)
ANY_OBJECT = {"type": "object"}

ASKED = [
    ({"response_format": JSON_SCHEMA}, Grammar.json_schema(SCHEMA)),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": True}}},
        Grammar.json_schema(SCHEMA),
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": False}}},
        Grammar.json_schema(SCHEMA, is_lenient=True),
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "it", "schema": SCHEMA, "strict": None, "description": None},
            }
        },
        Grammar.json_schema(SCHEMA),
    ),
    ({"response_format": {"type": "json_object"}}, Grammar.json_schema(ANY_OBJECT)),
    ({"response_format": {"type": "json_object", "json_schema": None}}, Grammar.json_schema(ANY_OBJECT)),
    ({"response_format": {"type": "structural_tag", **TAG}}, Grammar.structural_tag(STRUCTURES, ["<call"])),
    ({"structured_outputs": {"json": SCHEMA}}, Grammar.json_schema(SCHEMA)),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, Grammar.json_schema(SCHEMA)),
    ({"structured_outputs": {"json": {}}}, Grammar.json_schema({})),
    ({"structured_outputs": {"json": True}}, Grammar.json_schema(True)),
    ({"structured_outputs": {"json": SCHEMA, "regex": None}}, Grammar.json_schema(SCHEMA)),
    ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, Grammar.json_schema(SCHEMA, NONE)),
    (
        {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": r"\t"}},
        Grammar.json_schema(SCHEMA, Whitespace(pattern=r"\t")),
    ),
    (
        {"structured_outputs": {"json": SCHEMA, "separators": [", ", ": "]}},
        Grammar.json_schema(SCHEMA, Whitespace(separators=(", ", ": "))),
    ),
    ({"structured_outputs": {"regex": "a+"}}, Grammar.regex("a+")),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, Grammar.choice(["yes", "no"])),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, Grammar.grammar('start: "a"')),
    ({"structured_outputs": {"json_object": True}}, Grammar.json_schema(ANY_OBJECT)),
    ({"structured_outputs": {"structural_tag": TAG}}, Grammar.structural_tag(STRUCTURES, ["<call"])),
    (
        {"structured_outputs": {"structural_tag": json.dumps({"type": "structural_tag", **TAG})}},
        Grammar.structural_tag(STRUCTURES, ["<call"]),
    ),
    ({"guided_json": SCHEMA}, Grammar.json_schema(SCHEMA)),
    ({"guided_json": json.dumps(SCHEMA)}, Grammar.json_schema(SCHEMA)),
    ({"guided_json": {}}, Grammar.json_schema({})),
    (
        {"guided_json": SCHEMA, "guided_whitespace_pattern": " "},
        Grammar.json_schema(SCHEMA, Whitespace(pattern=" ")),
    ),
    ({"guided_regex": "a+"}, Grammar.regex("a+")),
    ({"guided_choice": ["yes", "no"]}, Grammar.choice(["yes", "no"])),
    ({"guided_grammar": 'root ::= "a"'}, Grammar.grammar('root ::= "a"')),
    ({"guided_regex": "a+", "guided_json": None, "guided_choice": []}, Grammar.regex("a+")),
]


@pytest.mark.parametrize("route", ["chat", "complete"])
@pytest.mark.parametrize(("fields", "grammar"), ASKED, ids=lambda value: None)
def test_each_field_asks_for_its_grammar(route: str, fields: dict[str, Any], grammar: Grammar, rig: Rig) -> None:
    response = getattr(rig, route)(**fields)
    assert response.status_code == 200, response.text
    [(tenant, asked)] = rig.engine.compiled
    assert asked == grammar
    assert tenant == rig.engine.generations[0].tenant
    assert rig.engine.generations[0].params.grammar == FakeCompiled(grammar)


@pytest.mark.parametrize("prompts", [1, 3])
def test_a_grammar_is_made_once_for_all_prompts(prompts: int, rig: Rig) -> None:
    assert rig.complete(prompt=["hi"] * prompts, guided_choice=["a"], n=2).status_code == 200
    assert len(rig.engine.compiled) == 1
    assert {g.params.grammar for g in rig.engine.generations} == {FakeCompiled(Grammar.choice(["a"]))}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": None},
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "text", "json_schema": None}},
        {"response_format": {}},
        {"structured_outputs": {}},
        {"guided_choice": []},
        {"guided_regex": ""},
        {"guided_json": None, "guided_grammar": False},
    ],
)
def test_what_asks_for_nothing_holds_the_answer_to_nothing(fields: dict[str, Any], rig: Rig) -> None:
    assert rig.chat(**fields).status_code == 200
    assert rig.engine.compiled == []
    assert rig.engine.generations[0].params.grammar is None


FAULTS = [
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format.json_schema.schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "more": 1}}},
        "response_format.json_schema.more",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": "yes"}}},
        "response_format.json_schema.strict",
    ),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "response_format.schema"),
    ({"response_format": {"type": "json_object", "json_schema": {"schema": SCHEMA}}}, "response_format.json_schema"),
    ({"response_format": {"type": "text", "json_schema": {"schema": SCHEMA}}}, "response_format.json_schema"),
    ({"response_format": {**JSON_SCHEMA, "structures": STRUCTURES}}, "response_format.structures"),
    ({"response_format": {"type": "structural_tag", **TAG, "json_schema": {}}}, "response_format.json_schema"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "structural_tag", "structures": STRUCTURES}}, "response_format.triggers"),
    (
        {"response_format": {"type": "structural_tag", "structures": [], "triggers": ["a"]}},
        "response_format.structures",
    ),
    ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs"),
    ({"structured_outputs": {"backend": "xgrammar", "regex": "a"}}, "structured_outputs.backend"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice[0]"),
    ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"structural_tag": "{"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"structural_tag": "1"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"structural_tag": {"structures": 1}}}, "structured_outputs.structural_tag"),
    (
        {"structured_outputs": {"structural_tag": {"type": "structural_tag", "format": {}}}},
        "structured_outputs.structural_tag.format",
    ),
    ({"structured_outputs": {"json": {}, "separators": [","]}}, "structured_outputs.separators"),
    ({"structured_outputs": {"json": {}, "separators": [", ", ": |x"]}}, "structured_outputs.separators"),
    ({"structured_outputs": {"json": {}, "separators": [":", ","]}}, "structured_outputs.separators"),
    ({"structured_outputs": {"json": {}, "separators": ["," + " " * 70, ":"]}}, "structured_outputs.separators"),
    (
        {"structured_outputs": {"json": {}, "separators": [",", ":"], "disable_any_whitespace": True}},
        "structured_outputs.separators",
    ),
    (
        {"structured_outputs": {"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}},
        "structured_outputs.whitespace_pattern",
    ),
    ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
    ({"structured_outputs": {"choice": ["a"], "separators": [",", ":"]}}, "structured_outputs.separators"),
    (
        {"structured_outputs": {"grammar": 'root ::= "a"', "disable_any_whitespace": True}},
        "structured_outputs.disable_any_whitespace",
    ),
    ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
    ({"guided_json": 5}, "guided_json"),
    ({"guided_regex": 5}, "guided_regex"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
    ({"guided_whitespace_pattern": " ", "guided_regex": "a"}, "guided_whitespace_pattern"),
    ({"guided_decoding_backend": "outlines", "guided_regex": "a"}, "guided_decoding_backend"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    ({"response_format": {"type": "json_object"}, "guided_json": SCHEMA}, "guided_json"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
    ({"response_format": JSON_SCHEMA, "structured_outputs": {"json": SCHEMA}}, "structured_outputs.json"),
    ({"guided_json": {**SCHEMA, "x-guidance": {"lenient": True}}}, "guided_json.x-guidance"),
]


@pytest.mark.parametrize(("fields", "param"), FAULTS, ids=lambda value: None)
def test_a_fault_is_a_400_on_its_field(fields: dict[str, Any], param: str, rig: Rig) -> None:
    response = rig.chat(**fields)
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"].startswith(param) if fields.get("response_format") == "json" else error["param"] == param
    assert rig.engine.generations == []
    assert rig.engine.compiled == []


NOT = {"begin": "<a>", "schema": {"not": {}}, "end": ""}


def test_what_the_compiler_refuses_is_named_by_its_place_in_the_schema(rig: Rig) -> None:
    schema = {
        "type": "object",
        "properties": {
            "not": {"type": "string", "enum": ["not"]},
            "list": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"not": {}}}]},
        },
        "required": ["not"],
    }
    rig.engine.refuse_grammar = InvalidGrammar("No.", keys=("not",))
    response = rig.chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    error = response.json()["error"]
    place = "response_format.json_schema.schema.properties.list.anyOf[1].items.not"
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_grammar", place)
    for fields, param in (
        ({"guided_json": {"type": "string"}}, "guided_json"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json.not"),
        (
            {"response_format": {"type": "structural_tag", "structures": [NOT], "triggers": ["<a"]}},
            "response_format.structures[0].schema.not",
        ),
    ):
        assert rig.complete(**fields).json()["error"]["param"] == param
    assert rig.engine.generations == []
    assert [each.outcome for each in rig.finished] == ["invalid"] * 5


def test_a_place_deep_in_a_schema_is_cut_as_everything_that_is_quoted(rig: Rig) -> None:
    rig.engine.refuse_grammar = InvalidGrammar("No.", keys=("not",))
    error = rig.chat(guided_json={"properties": {"x" * 5000: {"not": {}}}}).json()["error"]
    assert len(error["param"]) <= 201


def test_too_many_grammars_at_once_are_a_429(rig: Rig) -> None:
    rig.engine.refuse_grammar = QueueFull("64 grammars are being made ready.")
    response = rig.chat(guided_regex="a")
    assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
    assert "retry-after" in response.headers


def test_a_grammar_that_fails_in_the_middle_is_an_error_or_the_last_event(rig: Rig) -> None:
    rig.engine.error_at, rig.engine.error = 0, InvalidGrammar("Too complex.")
    response = rig.chat(guided_regex="a")
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_grammar")
    rig.engine.error_at = 2
    *_, last, _ = rig.chat(guided_regex="a", stream=True).text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "invalid_grammar"


def test_the_openapi_document_has_the_fields(rig: Rig) -> None:
    schemas = rig.client.get("/openapi.json").json()["components"]["schemas"]
    for body in ("ChatRequest", "CompletionRequest"):
        assert {"response_format", "structured_outputs", "guided_json"} <= schemas[body]["properties"].keys()
    assert {"json", "regex", "choice", "grammar"} <= schemas["StructuredOutputs"]["properties"].keys()
    assert "schema" in schemas["JsonSchemaFormat"]["properties"]
