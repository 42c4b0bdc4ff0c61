"""Calls that must be made, and arguments that must follow a schema, as the grammar that the answer is held to."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from manylora.chat.format import Syntax
from manylora.chat.parameters import SAYS_NOTHING, is_text, resolved, schema_of
from manylora.errors import InvalidGrammar, quoted
from manylora.grammars.grammar import Grammar, Whitespace

__all__ = ["CallRules", "HeldTool"]

_MOST_CALLS: Final = 32
_MOST_OTHERS: Final = 32  # arguments that no schema names


@dataclass(frozen=True, slots=True)
class HeldTool:
    """A tool whose arguments follow a schema; with `is_lenient`, as far as that can be seen to."""

    name: str
    schema: Mapping[str, Any]
    is_lenient: bool

    def arguments(self) -> str:
        """What the grammar says of them."""
        return _json({"type": "object", **self.schema}, self.is_lenient)


@dataclass(frozen=True, slots=True)
class CallRules:
    """What calls an answer must or may make. With `must_call` there is at least one.

    Without, there may be text in place of calls or before them, and with `text_schema`, the source of a grammar of the
    kind `json_schema`, JSON of it in their place.
    """

    tools: Sequence[HeldTool]
    must_call: bool
    only_one: bool
    text_schema: str | None = None

    def grammar(self, syntax: Syntax) -> Grammar:
        """The grammar in the base's notation."""
        first, *others = _NOTATIONS[syntax](self)
        return Grammar.calls([f"start: {first}", *others], _MARKS[syntax])

    @property
    def most(self) -> int:
        return 1 if self.only_one else _MOST_CALLS


def _literal(text: str) -> str:
    return json.dumps(text)


def _json(schema: Any, is_lenient: bool) -> str:
    # Python's own separators, as models are shown them: nothing is open between the parts.
    options = Whitespace(separators=(", ", ": ")).options() | ({"lenient": True} if is_lenient else {})
    return "%json " + json.dumps({**schema, "x-guidance": options})


def _many(rules: CallRules, name: str, between: str) -> str:
    """One call or more, as the rules have it."""
    return name if rules.most == 1 else f"{name} ({between} {name}){{0,{rules.most - 1}}}"


def _object(tool: HeldTool, key: str) -> str:
    return f'{_literal(f"""{{"name": {json.dumps(tool.name)}, "{key}": """)} {tool.arguments()} "}}"'


def _choices(name: str, bodies: Sequence[str]) -> list[str]:
    """A rule for each body, and one for any of them."""
    numbered = [f"{name}_{number}" for number in range(len(bodies))]
    return [f"{name}: {' | '.join(numbered)}", *(f"{one}: {body}" for one, body in zip(numbered, bodies, strict=True))]


def _marked(rules: CallRules, mark: str, calls: str) -> str:
    """What an answer is whose calls begin with a mark."""
    if rules.text_schema is not None and not rules.must_call:
        return f"({mark} {calls}) | %json {rules.text_schema}"
    return f"{mark} {calls}" if rules.must_call else f"(to_{mark} {calls})? TEXT"


def _hermes(rules: CallRules) -> list[str]:
    bodies = [f'"\\n" {_object(tool, "arguments")} "\\n" closing' for tool in rules.tools]
    return [_marked(rules, "opening", _many(rules, "body", '"\\n" opening')), *_choices("body", bodies)]


def _mistral(rules: CallRules) -> list[str]:
    calls = f'"[" {_many(rules, "body", _literal(", "))} "]"'
    return [_marked(rules, "calls", calls), *_choices("body", [_object(tool, "arguments") for tool in rules.tools])]


def _mistral_args(rules: CallRules) -> list[str]:
    bodies = [f"{_literal(tool.name)} arguments {tool.arguments()}" for tool in rules.tools]
    return [_marked(rules, "calls", _many(rules, "body", "calls")), *_choices("body", bodies)]


def _llama3_json(rules: CallRules) -> list[str]:
    calls = _many(rules, "body", _literal("; "))
    bodies = [_object(tool, "parameters") for tool in rules.tools]
    return [*_bare(rules, calls, "/[^{\\s<](.|\\n)*/"), *_choices("body", bodies)]


def _pythonic(rules: CallRules) -> list[str]:
    calls = f'"[" {_many(rules, "body", _literal(", "))} "]"'
    forms = [_properties(tool) for tool in rules.tools]
    bodies = [
        f'{_literal(f"{tool.name}(")} {_keywords(tool, *form)} ")"'
        for tool, form in zip(rules.tools, forms, strict=True)
    ]
    others = _OTHER_KEYWORDS if any(is_open for _, is_open in forms) else ()
    return [*_bare(rules, calls, "/[^\\[\\s](.|\\n)*/"), *_choices("body", bodies), *others]


def _deepseek_v3(rules: CallRules) -> list[str]:
    ends = _literal("\n```")
    begins = [_literal(f"{tool.name}\n```json\n") for tool in rules.tools]
    bodies = [
        f'call "function" separator {begin} {tool.arguments()} {ends} call_end'
        for begin, tool in zip(begins, rules.tools, strict=True)
    ]
    calls = f"{_many(rules, 'body', _literal(chr(10)))} calls_end"
    return [_marked(rules, "calls", calls), *_choices("body", bodies)]


def _deepseek_v31(rules: CallRules) -> list[str]:
    bodies = [f"call {_literal(tool.name)} separator {tool.arguments()} call_end" for tool in rules.tools]
    return [_marked(rules, "calls", f"{_many(rules, 'body', '')} calls_end"), *_choices("body", bodies)]


def _qwen3_coder(rules: CallRules) -> list[str]:
    bodies, texts, are_open = [], [], []
    for number, tool in enumerate(rules.tools):
        arguments = []
        properties, is_open = _properties(tool)
        for at, (name, schema, is_required) in enumerate(properties):
            begin = _literal(f"<parameter={name}>\n")
            if is_text(schema):
                texts.append(f"text_{number}_{at}[lazy]: {_raw(name, schema, tool.is_lenient)}")
                one = f"{begin} text_{number}_{at}"
            else:
                one = f"{begin} {_json(schema, tool.is_lenient)} {_literal(_VALUE_END)}"
            arguments.append(one if is_required else f"({one})?")
        if is_open:
            arguments.append(f"other{{0,{_MOST_OTHERS}}}")
        are_open.append(is_open)
        head = _literal(f"\n<function={tool.name}>\n")
        bodies.append(" ".join([head, *arguments, _literal("</function>\n"), "closing"]))
    unended = r"UNENDED: ~/(.|\n)*<\/parameter>(.|\n)*/"
    calls = _many(rules, "body", _literal("\n") + " opening")
    texts += _OTHER_TEXTS if any(are_open) else ()
    return [_marked(rules, "opening", calls), *_choices("body", bodies), *texts, *([unended] if texts else [])]


_VALUE_END: Final = "\n</parameter>\n"
# An argument that no schema names, in Qwen3-Coder's notation and as `name=JSON`.
_OTHER_TEXTS: Final = (
    "other: OTHER_BEGIN other_text",
    r"OTHER_BEGIN: /<parameter=[A-Za-z_][A-Za-z0-9_.-]{0,63}>\n/",
    f"other_text[lazy]: UNENDED {_literal(_VALUE_END)}",
)
_OTHER_KEYWORDS: Final = (
    f"other: OTHER_BEGIN {_json({}, is_lenient=True)}",
    "OTHER_BEGIN: /[A-Za-z_][A-Za-z0-9_]{0,63}=/",
)
# Of a string's schema what a text can be held to, and what a schema may say of all arguments together.
_HELD_OF_TEXT: Final = frozenset({"type", "enum", "const", "minLength", "maxLength"})
_OF_ALL: Final = frozenset(
    {
        *("$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "not", "if", "then", "else", "enum", "const"),
        *("patternProperties", "propertyNames", "minProperties", "maxProperties", "unevaluatedProperties"),
        *("dependentRequired", "dependentSchemas", "dependencies"),
    }
)


def _raw(name: str, schema: Mapping[str, Any], is_lenient: bool) -> str:
    """A string as it is, without quotes, with what ends it. Raises InvalidGrammar for what it cannot be held to."""
    others = tuple(key for key in schema if key not in _HELD_OF_TEXT | SAYS_NOTHING)
    if (others and not is_lenient) or re.search(r"[<>\n]", name):
        raise InvalidGrammar(
            f"The argument '{quoted(name)}' cannot be held to its schema in this base's notation. Leave out 'strict'.",
            keys=others,
        )
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if values is not None:
        texts = [value for value in values if isinstance(value, str) and "</parameter>" not in value]
        return f"({' | '.join(map(_literal, texts)) or 'UNENDED'}) {_literal(_VALUE_END)}"
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    if not least and most == "":
        return f"UNENDED {_literal(_VALUE_END)}"
    return rf"(/(.|\n){{{least},{most}}}/ & UNENDED) {_literal(_VALUE_END)}"


def _bare(rules: CallRules, calls: str, other: str) -> list[str]:
    """What an answer is that is calls as a whole, or begins otherwise."""
    if rules.text_schema is not None and not rules.must_call:
        return [f"({calls}) | %json {rules.text_schema}"]
    return [calls] if rules.must_call else [f"({calls}) | OTHER?", f"OTHER: {other}"]


def _properties(tool: HeldTool) -> tuple[list[tuple[str, Any, bool]], bool]:
    """The arguments in the order of the schema, those that are required before the others, and whether they are.

    The last says whether there may be others. Raises InvalidGrammar where the schema is none of an object, and, unless
    it is lenient, where it says more than can be seen to for each argument by itself.
    """
    whole = resolved(tool.schema, tool.schema)
    assert isinstance(whole, Mapping), "a schema of arguments is an object, and so is what it refers to"
    properties, needed = whole.get("properties") or {}, whole.get("required") or []
    if not (isinstance(properties, Mapping) and isinstance(needed, list) and all(isinstance(n, str) for n in needed)):
        raise InvalidGrammar(
            f"The parameters of '{quoted(tool.name)}' need an object as 'properties', a list of names as 'required'.",
            keys=("properties", "required"),
        )
    names = list(dict.fromkeys([*properties, *needed]))
    unheld = _unheld(whole, len(names) > len(properties))
    if unheld and not tool.is_lenient:
        raise InvalidGrammar(
            f"The arguments of '{quoted(tool.name)}' cannot be held to '{quoted(unheld[0])}' in this base's notation: "
            "say in 'properties' what they are, or leave out 'strict'.",
            keys=unheld,
        )
    shared = {key: tool.schema[key] for key in ("$defs", "definitions") if key in tool.schema}
    found = {name: schema_of(name, tool.schema) for name in names}
    parts = {name: {**part, **shared} if isinstance(part, Mapping) else {} for name, part in found.items()}
    ordered = sorted(names, key=lambda name: name not in needed)
    has_others = whole.get("additionalProperties", "properties" not in whole) is not False
    return [(name, parts[name], name in needed) for name in ordered], tool.is_lenient and (bool(unheld) or has_others)


def _unheld(schema: Mapping[str, Any], needs_others: bool) -> tuple[str, ...]:
    """Keys of a schema of all arguments that are not seen to where each is held by itself."""
    keys = [key for key in schema if key in _OF_ALL]
    others = schema.get("additionalProperties")
    if isinstance(others, Mapping) and others:
        keys.append("additionalProperties")
    if needs_others and others is False:
        keys.append("required")
    if schema.get("type", "object") != "object":
        keys.append("type")
    return tuple(keys)


def _keywords(tool: HeldTool, properties: Sequence[tuple[str, Any, bool]], is_open: bool) -> str:
    """Arguments as `name=JSON`."""
    values = {name: f"{_literal(f'{name}=')} {_json(part, tool.is_lenient)}" for name, part, _ in properties}
    comma = _literal(", ")
    required = [values[name] for name, _, is_required in properties if is_required]
    optional = [values[name] for name, _, is_required in properties if not is_required]
    if is_open:
        optional.append(f"other ({comma} other){{0,{_MOST_OTHERS - 1}}}")
    if required:
        first = f" {comma} ".join(required)
        return " ".join([first, *(f"({comma} {one})?" for one in optional)])
    tails = [
        " ".join([one, *(f"({comma} {after})?" for after in optional[number + 1 :])])
        for number, one in enumerate(optional)
    ]
    return f"({' | '.join(tails)})?" if tails else ""


_NOTATIONS: Final[dict[Syntax, Callable[[CallRules], list[str]]]] = {
    "hermes": _hermes,
    "llama3_json": _llama3_json,
    "mistral": _mistral,
    "mistral_args": _mistral_args,
    "pythonic": _pythonic,
    "deepseek_v3": _deepseek_v3,
    "deepseek_v31": _deepseek_v31,
    "qwen3_coder": _qwen3_coder,
}
_DEEPSEEK: Final = {
    "calls": "<｜tool▁calls▁begin｜>",
    "call": "<｜tool▁call▁begin｜>",
    "separator": "<｜tool▁sep｜>",
    "call_end": "<｜tool▁call▁end｜>",
    "calls_end": "<｜tool▁calls▁end｜>",
}

_MARKS: Final[dict[Syntax, Mapping[str, str]]] = {
    "hermes": {"opening": "<tool_call>", "closing": "</tool_call>"},
    "llama3_json": {},
    "mistral": {"calls": "[TOOL_CALLS]"},
    "mistral_args": {"calls": "[TOOL_CALLS]", "arguments": "[ARGS]"},
    "pythonic": {},
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v31": _DEEPSEEK,
    "qwen3_coder": {"opening": "<tool_call>", "closing": "</tool_call>"},
}
