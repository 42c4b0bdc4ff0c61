"""Calls that must be made, and arguments that must follow a schema, as the grammar that the answer is held to."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from manylora.chat.format import Syntax
from manylora.chat.parameters import is_text
from manylora.errors import InvalidGrammar, quoted
from manylora.grammars.grammar import Grammar, Whitespace

__all__ = ["CallRules", "HeldTool"]

_MOST_CALLS: Final = 32


@dataclass(frozen=True, slots=True)
class HeldTool:
    """A tool whose arguments follow a schema; with `is_lenient`, as far as that can be seen to."""

    name: str
    schema: Mapping[str, Any]
    is_lenient: bool

    def arguments(self) -> str:
        """What the grammar says of them."""
        return _json(self.schema, self.is_lenient)


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
    bodies = [f'{_literal(f"{tool.name}(")} {_keywords(tool)} ")"' for tool in rules.tools]
    return [*_bare(rules, calls, "/[^\\[\\s](.|\\n)*/"), *_choices("body", bodies)]


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
    bodies, texts = [], []
    for number, tool in enumerate(rules.tools):
        arguments = []
        for at, (name, schema, is_required) in enumerate(_properties(tool)):
            begin = _literal(f"<parameter={name}>\n")
            if is_text(schema):
                texts.append(f"text_{number}_{at}[lazy]: {_raw(name, schema, tool.is_lenient)}")
                one = f"{begin} text_{number}_{at}"
            else:
                one = f"{begin} {_json(schema, tool.is_lenient)} {_literal(_VALUE_END)}"
            arguments.append(one if is_required else f"({one})?")
        head = _literal(f"\n<function={tool.name}>\n")
        bodies.append(" ".join([head, *arguments, _literal("</function>\n"), "closing"]))
    unended = r"UNENDED: ~/(.|\n)*<\/parameter>(.|\n)*/"
    calls = _many(rules, "body", _literal("\n") + " opening")
    return [_marked(rules, "opening", calls), *_choices("body", bodies), *texts, *([unended] if texts else [])]


_VALUE_END: Final = "\n</parameter>\n"
# Of a string's schema what a text can be held to, and what says nothing of it.
_HELD_OF_TEXT: Final = frozenset({"type", "enum", "const", "minLength", "maxLength"})
_SAYS_NOTHING: Final = frozenset({"title", "description", "default", "examples", "deprecated", "$comment"})


def _raw(name: str, schema: Mapping[str, Any], is_lenient: bool) -> str:
    """A string as it is, without quotes, with what ends it. Raises InvalidGrammar for what it cannot be held to."""
    others = tuple(key for key in schema if key not in _HELD_OF_TEXT | _SAYS_NOTHING)
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


def _properties(tool: HeldTool) -> list[tuple[str, Any, bool]]:
    """The arguments in the order of the schema, those that are required before the others, and whether they are."""
    properties = dict(tool.schema.get("properties") or {})
    shared = {key: tool.schema[key] for key in ("$defs", "definitions") if key in tool.schema}
    needed = tool.schema.get("required") or ()
    parts = {name: {**part, **shared} if isinstance(part, dict) else {} for name, part in properties.items()}
    ordered = sorted(properties, key=lambda name: name not in needed)
    return [(name, parts[name], name in needed) for name in ordered]


def _keywords(tool: HeldTool) -> str:
    """Arguments as `name=JSON`."""
    properties = _properties(tool)
    values = {name: f"{_literal(f'{name}=')} {_json(part, tool.is_lenient)}" for name, part, _ in properties}
    required = [name for name, _, is_required in properties if is_required]
    optional = [name for name, _, is_required in properties if not is_required]
    comma = _literal(", ")
    if required:
        first = f" {comma} ".join(values[name] for name in required)
        return " ".join([first, *(f"({comma} {values[name]})?" for name in optional)])
    tails = [
        " ".join([values[name], *(f"({comma} {values[after]})?" for after in optional[number + 1 :])])
        for number, name in enumerate(optional)
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
