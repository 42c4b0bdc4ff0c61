"""Arguments that are written as text, each by itself: which are text already, and what the others stand for."""

import json
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import unquote

__all__ = ["SAYS_NOTHING", "is_text", "resolved", "schema_of", "value_of"]

# Keys of a schema that say nothing of the value itself.
SAYS_NOTHING: Final = frozenset(
    {
        *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
        *("$comment", "$schema", "$id", "$defs", "definitions"),
    }
)
_MOST_REFERENCES: Final = 16
_CONSTANTS: Final = {"True": True, "False": False, "None": None}
_KINDS: Final = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def resolved(schema: object, root: object) -> object:
    """The part of `root` that a schema refers to where it says nothing else, else the schema itself."""
    for _ in range(_MOST_REFERENCES):
        target = _target(schema, root)
        if target is None:
            break
        schema = target
    return schema


def _target(schema: object, root: object) -> Mapping[str, Any] | None:
    place = schema.get("$ref") if isinstance(schema, Mapping) and schema.keys() <= SAYS_NOTHING | {"$ref"} else None
    if not isinstance(place, str) or not place.startswith("#/"):
        return None
    found = root
    for key in unquote(place[2:]).split("/"):
        found = found.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else None


def schema_of(name: str, arguments: object) -> object:
    """What `arguments`, the schema of all of them, says of one, behind a reference where there is one."""
    whole = resolved(arguments, arguments)
    if not isinstance(whole, Mapping):
        return None
    properties = whole.get("properties")
    named = properties if isinstance(properties, Mapping) else {}
    return resolved(named.get(name, whole.get("additionalProperties")), arguments)


def is_text(schema: object) -> bool:
    """Whether an argument of this schema is a string and nothing else, so that it stands there without quotes."""
    if not isinstance(schema, Mapping):
        return False
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if "type" not in schema and isinstance(values, list) and values:
        return all(isinstance(each, str) for each in values)
    return bool(schema.get("type") == "string")


def value_of(text: str, schema: object, root: object) -> Any:
    """What a text stands for as an argument of this schema: JSON or a constant of Python's, else the text itself.

    References of the schema are to `root`.
    """
    try:
        value = json.loads(text, parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # 1e999 is no number that JSON can write
    except (ValueError, RecursionError):
        name = text.strip()
        if name not in _CONSTANTS:
            return text
        value = _CONSTANTS[name]
    taken = _kinds_of(schema, root)
    kind = "null" if value is None else _KINDS[type(value)]
    is_taken = kind in taken or (kind == "integer" and "number" in taken)
    return text if "string" in taken and not is_taken else value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _kinds_of(schema: object, root: object) -> set[str]:
    """The types that a schema takes, as far as it says so itself."""
    if not isinstance(schema, Mapping):
        return set()
    told = schema.get("type", [])
    kinds = {told} if isinstance(told, str) else {each for each in told if isinstance(each, str)} if told else set()
    for key in ("anyOf", "oneOf"):
        parts = schema.get(key)
        for part in parts if isinstance(parts, list) else ():
            one = resolved(part, root)
            if isinstance(one, Mapping) and isinstance(one.get("type"), str):
                kinds.add(one["type"])
    return kinds
