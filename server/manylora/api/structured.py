"""The fields that hold an answer to a schema, a regular expression or a grammar, and which grammar they ask for.

OpenAI's `response_format`, vLLM's `structured_outputs`, and the `guided_…` fields that vLLM had before it. A request
may be held to one thing only.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import orjson
from pydantic import ConfigDict, Field, field_validator

from manylora.api.strict import Strict
from manylora.engine.interface import Grammar, Whitespace
from manylora.errors import InvalidGrammar, InvalidRequest, quoted

__all__ = ["ANSWER_FIELDS", "Asked", "ResponseFormat", "StructuredOutputs", "asked_for", "check_goes_with", "placed"]

Text = Annotated[str, Field(min_length=1)]
Schema = dict[str, Any] | bool
_ANY_OBJECT: Final[dict[str, Any]] = {"type": "object"}
# Whose values, and not keys of their own, are what a schema's keys hold.
_MAPS: Final = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_DATA: Final = frozenset({"enum", "const", "default", "examples", "required"})

_FIELDS_OF: Final = {"json_schema": ("json_schema",), "structural_tag": ("structures", "triggers")}

ANSWER_FIELDS: Final = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_whitespace_pattern",
)
"""In which a value that real clients send for nothing counts as absent, as it does in fields that are not served."""


class JsonSchemaFormat(Strict):
    """`response_format.json_schema`. `name` and `description` are the caller's own: the model does not see them."""

    name: str | None = None
    description: str | None = None
    schema_: Schema | None = Field(default=None, alias="schema")
    strict: bool | None = Field(
        default=None, description="`false` leaves out what an answer cannot be held to, in place of a 400."
    )


class Structure(Strict):
    """One structure of a structural tag."""

    begin: Text
    schema_: Schema | None = Field(default=None, alias="schema")
    end: str


class ResponseFormat(Strict):
    """`response_format`. Which of the other fields there are goes by `type`."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    structures: list[Structure] | None = Field(default=None, fail_fast=True)
    triggers: list[Text] | None = Field(default=None, fail_fast=True)


class StructuredOutputs(Strict):
    """`structured_outputs`: one of the first six, and what may stand between the parts of JSON."""

    model_config = ConfigDict(**Strict.model_config, populate_by_name=True)

    json_: Schema | str | None = Field(default=None, alias="json", description="A schema, or one as a string.")
    regex: Text | None = None
    choice: list[str] | None = Field(default=None, min_length=1, fail_fast=True)
    grammar: Text | None = Field(default=None, description="In Lark's notation or in GBNF.")
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: Text | None = None
    separators: list[str] | None = Field(
        default=None,
        fail_fast=True,
        description='What stands between two items, and between a key and its value: `[", ", ": "]`.',
    )

    @field_validator("separators")
    @classmethod
    def _check_separators(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and not (
            len(value) == 2 and [each.strip(" \t\r\n") for each in value] == [",", ":"] and len("".join(value)) <= 64
        ):
            raise ValueError('must be a comma and a colon, with spaces around them as wanted, such as [", ", ": "]')
        return value

    def whitespace(self) -> Whitespace:
        """Raises InvalidRequest where more than one field is about it."""
        asked = self._whitespace_fields
        if len(asked) > 1:
            raise InvalidRequest(
                f"'{asked[0]}' and '{asked[1]}' both say what stands between the parts of JSON. Send one.",
                param=f"structured_outputs.{asked[1]}",
            )
        pair = (self.separators[0], self.separators[1]) if self.separators else None
        return Whitespace(self.disable_any_whitespace, self.whitespace_pattern, pair)

    @property
    def whitespace_field(self) -> str | None:
        """The field that is about it."""
        return next(iter(self._whitespace_fields), None)

    @property
    def _whitespace_fields(self) -> list[str]:
        ways = {
            "disable_any_whitespace": self.disable_any_whitespace,
            "whitespace_pattern": self.whitespace_pattern,
            "separators": self.separators,
        }
        return [name for name, value in ways.items() if value]


@dataclass(frozen=True, slots=True)
class Asked:
    """The grammar that a request asks for, the field that says so, and the schema in it, if it has one."""

    grammar: Grammar
    param: str
    schema: Any = None

    def refusal(self, error: InvalidGrammar) -> InvalidGrammar:
        """The error with the place of what is at fault."""
        return placed(error, self.param, self.schema)


def placed(error: InvalidGrammar, param: str, schema: Any) -> InvalidGrammar:
    """The error with the place, in a field that has this schema, of what is at fault."""
    place = _place_of(schema, set(error.keys)) if error.keys else None
    return InvalidGrammar(error.message, param=param if place is None else f"{param}{place}")


def asked_for(fields: Mapping[str, Any]) -> Asked | None:
    """What the `ANSWER_FIELDS` of a body ask for; None where they ask for nothing. Raises InvalidRequest."""
    found = [each for each in _all(fields) if each is not None]
    if len(found) > 1:
        raise InvalidRequest(
            f"'{found[0].param}' and '{found[1].param}' both say what the answer must look like. Send one.",
            param=found[1].param,
        )
    if fields.get("guided_whitespace_pattern") and fields.get("guided_json") is None:
        raise InvalidRequest(
            "'guided_whitespace_pattern' goes with 'guided_json'. Send both, or leave it out.",
            param="guided_whitespace_pattern",
        )
    return found[0] if found else None


def _all(fields: Mapping[str, Any]) -> Iterator[Asked | None]:
    response_format, outputs = fields.get("response_format"), fields.get("structured_outputs")
    if response_format is not None:
        yield _of_format(response_format)
    if outputs is not None:
        yield from _of_outputs(outputs)
    whitespace = Whitespace(pattern=fields.get("guided_whitespace_pattern"))
    yield _of_json(fields.get("guided_json"), "guided_json", whitespace)
    yield _of_text(Grammar.regex, fields.get("guided_regex"), "guided_regex")
    yield _of_text(Grammar.choice, fields.get("guided_choice"), "guided_choice")
    yield _of_text(Grammar.grammar, fields.get("guided_grammar"), "guided_grammar")


def _of_text(make: Any, value: Any, param: str) -> Asked | None:
    return None if value is None else Asked(make(value), param)


def check_goes_with(value: Any, fields_of: Mapping[str, Sequence[str]], where: str) -> None:
    """Raises InvalidRequest for a field that other types of the value have, by type, and its own has not."""
    for kind, fields in fields_of.items():
        for name in fields if kind != value.type else ():
            if getattr(value, name):
                field = f"{where}.{type(value).model_fields[name].alias or name}"
                raise InvalidRequest(f"'{field}' goes with the type '{kind}'. Leave it out.", param=field)


def _of_format(value: ResponseFormat) -> Asked | None:
    check_goes_with(value, _FIELDS_OF, "response_format")
    if value.type == "json_object":
        return Asked(Grammar.json_schema(_ANY_OBJECT), "response_format")
    if value.type == "structural_tag":
        return _of_tag(value.structures, value.triggers, "response_format", Whitespace())
    if value.type == "text":
        return None
    described = value.json_schema
    if described is None or described.schema_ is None:
        where = "response_format.json_schema" + ("" if described is None else ".schema")
        raise InvalidRequest(f"The field '{where}' is required with the type 'json_schema'.", param=where)
    return _of_schema(
        described.schema_, "response_format.json_schema.schema", Whitespace(), is_lenient=described.strict is False
    )


def _of_outputs(value: StructuredOutputs) -> Iterator[Asked | None]:
    where = "structured_outputs"
    whitespace = value.whitespace()
    found = [
        _of_json(value.json_, f"{where}.json", whitespace),
        _of_text(Grammar.regex, value.regex, f"{where}.regex"),
        _of_text(Grammar.choice, value.choice, f"{where}.choice"),
        _of_text(Grammar.grammar, value.grammar, f"{where}.grammar"),
        Asked(Grammar.json_schema(_ANY_OBJECT, whitespace), f"{where}.json_object") if value.json_object else None,
        _of_tag_text(value.structural_tag, f"{where}.structural_tag", whitespace),
    ]
    if not any(found):
        raise InvalidRequest(
            "'structured_outputs' has none of 'json', 'regex', 'choice', 'grammar', 'json_object' and "
            "'structural_tag'. Send one of them.",
            param=where,
        )
    asked = next(each for each in found if each is not None)
    if whitespace != Whitespace() and asked.grammar.kind not in ("json_schema", "structural_tag"):
        name = value.whitespace_field
        raise InvalidRequest(
            f"'{where}.{name}' is about JSON, and '{asked.param}' asks for something else. Leave it out.",
            param=f"{where}.{name}",
        )
    yield from found


def _of_json(value: Any, param: str, whitespace: Whitespace) -> Asked | None:
    if value is None:
        return None
    return _of_schema(_parsed(value, param) if isinstance(value, str) else value, param, whitespace)


def _of_schema(schema: Any, param: str, whitespace: Whitespace, *, is_lenient: bool = False) -> Asked:
    if isinstance(schema, dict) and "x-guidance" in schema:
        raise InvalidRequest(
            f"'{param}' has the key 'x-guidance', which is the server's own. Leave it out.", param=f"{param}.x-guidance"
        )
    return Asked(Grammar.json_schema(schema, whitespace, is_lenient=is_lenient), param, schema)


def _of_tag_text(value: Any, param: str, whitespace: Whitespace) -> Asked | None:
    """vLLM takes the whole of a structural tag as a string, too."""
    if value is None:
        return None
    tag = _parsed(value, param) if isinstance(value, str) else value
    if not isinstance(tag, dict):
        raise InvalidRequest(f"'{param}' must be an object, or one as a string.", param=param)
    unknown = next((key for key in tag if key not in ("type", "structures", "triggers")), None)
    if unknown is not None:
        where = f"{param}.{quoted(unknown)}"
        raise InvalidRequest(f"'{where}' is not supported: send 'structures' and 'triggers'.", param=where)
    try:
        made = ResponseFormat.model_validate({**tag, "type": "structural_tag"})
    except ValueError:
        raise InvalidRequest(
            f"'{param}' must have 'structures', each with 'begin', 'schema' and 'end', and 'triggers'.", param=param
        ) from None
    return _of_tag(made.structures, made.triggers, param, whitespace)


def _of_tag(
    structures: list[Structure] | None, triggers: list[str] | None, param: str, whitespace: Whitespace
) -> Asked:
    for value, name in ((structures, "structures"), (triggers, "triggers")):
        if not value:
            raise InvalidRequest(f"The field '{param}.{name}' is required, and not empty.", param=f"{param}.{name}")
    assert structures is not None
    assert triggers is not None
    parts = [
        {"begin": each.begin, "schema": True if each.schema_ is None else each.schema_, "end": each.end}
        for each in structures
    ]
    schemas = {"structures": [{"schema": part["schema"]} for part in parts]}
    return Asked(Grammar.structural_tag(parts, triggers, whitespace), param, schemas)


def _parsed(text: str, param: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"'{param}' is a string that is not valid JSON: {error}.", param=param) from None


def _place_of(schema: Any, keys: set[str]) -> str | None:
    """Where a schema has one of these keys, as the end of a path: `.properties.name.not`; the nearest to its top."""
    level = [("", schema)]
    while level:
        below: list[tuple[str, Any]] = []
        for path, part in level:
            if isinstance(part, list):
                below += [(f"{path}[{number}]", each) for number, each in enumerate(part)]
            elif isinstance(part, dict):
                found = next((key for key in part if key in keys), None)
                if found is not None:
                    return f"{path}.{found}"
                for key, value in part.items():
                    if key in _MAPS and isinstance(value, dict):
                        below += [(f"{path}.{key}.{quoted(name)}", each) for name, each in value.items()]
                    elif key not in _DATA:
                        below.append((f"{path}.{key}", value))
        level = below
    return None
