"""Arguments that are written as text, each by itself: which are text already, and what the others stand for."""

import json
from collections.abc import Mapping
from typing import Any, Final

__all__ = ["is_text", "value_of"]

_CONSTANTS: Final = {"True": True, "False": False, "None": None}
_KINDS: Final = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def is_text(schema: object) -> bool:
    """Whether an argument of this schema is a string and nothing else, so that it stands there without quotes."""
    if not isinstance(schema, Mapping):
        return False
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if "type" not in schema and isinstance(values, list) and values:
        return all(isinstance(each, str) for each in values)
    return bool(schema.get("type") == "string")


def value_of(text: str, schema: object) -> Any:
    """What a text stands for as an argument of this schema: JSON or a constant of Python's, else the text itself."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        name = text.strip()
        if name not in _CONSTANTS:
            return text
        value = _CONSTANTS[name]
    taken = _kinds_of(schema)
    kind = "null" if value is None else _KINDS[type(value)]
    is_taken = kind in taken or (kind == "integer" and "number" in taken)
    return text if "string" in taken and not is_taken else value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _kinds_of(schema: object) -> set[str]:
    """The types that a schema takes, as far as it says so itself."""
    if not isinstance(schema, Mapping):
        return set()
    told = schema.get("type", [])
    kinds = {told} if isinstance(told, str) else {each for each in told if isinstance(each, str)} if told else set()
    for key in ("anyOf", "oneOf"):
        parts = schema.get(key)
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, Mapping) and isinstance(part.get("type"), str):
                kinds.add(part["type"])
    return kinds
