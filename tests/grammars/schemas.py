"""Random JSON schemas, all of which some JSON satisfies, for tests that hold answers to them."""

import json
import random
from typing import Any

import jsonschema

WORDS = ("alpha", "beta", "gamma", "delta", "naïve", 'a "b"', "c/d", "x_1", "日本", "-", "null", "")
PATTERNS = ("^[a-c]{1,4}$", "^[A-Z]{2}-[0-9]{1,3}$", "^(yes|no)$", "^x?y*z{1,2}$", "[0-9]$")
FORMATS = ("date", "uuid", "ipv4", "email")
MAX_DEPTH = 3


def random_schema(seed: int) -> dict[str, Any]:
    """One schema; the same for the same seed."""
    rng = random.Random(seed)
    schema = _any(rng, 0)
    if rng.random() < 0.3:
        schema = {
            "$defs": {"leaf": _leaf(rng), "inner": _object(rng, MAX_DEPTH - 1)},
            "type": "object",
            "properties": {"one": {"$ref": "#/$defs/leaf"}, "two": {"$ref": "#/$defs/inner"}, "three": schema},
            "required": ["one", "three"],
            "additionalProperties": False,
        }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"schema {seed}", **schema}


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    if depth >= MAX_DEPTH:
        return _leaf(rng)
    return rng.choice((_leaf, _object, _array, _mixed, _object))(rng, depth)


def _leaf(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    return rng.choice((_string, _number, _fixed))(rng)


def _string(rng: random.Random) -> dict[str, Any]:
    how = rng.randrange(4)
    if how == 0:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    if how == 1:
        return {"type": "string", "format": rng.choice(FORMATS)}
    least = rng.randrange(3)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randrange(1, 9)}


def _number(rng: random.Random) -> dict[str, Any]:
    low = rng.randrange(-50, 50)
    kind = rng.choice(("integer", "number"))
    bound = {rng.choice(("minimum", "exclusiveMinimum")): low, rng.choice(("maximum", "exclusiveMaximum")): low + 30}
    return {"type": kind, **(bound if rng.random() < 0.8 else {"minimum": 0, "maximum": 1000, "multipleOf": 5})}


def _fixed(rng: random.Random) -> dict[str, Any]:
    how = rng.randrange(3)
    if how == 0:
        return {"type": rng.choice(("boolean", "null"))}
    values: list[Any] = [rng.choice(WORDS), rng.randrange(100), True, None, {"k": [1, rng.choice(WORDS)]}]
    return {"const": rng.choice(values)} if how == 1 else {"enum": rng.sample(values, 3)}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randrange(1, 5))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _any(rng, depth + 1) for name in names},
        "required": rng.sample(names, rng.randrange(len(names) + 1)),
        "additionalProperties": False,
    }
    return schema


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randrange(3)
    schema: dict[str, Any] = {"type": "array", "minItems": least, "maxItems": least + rng.randrange(1, 3)}
    if rng.random() < 0.3:
        schema["prefixItems"] = [_any(rng, depth + 1)]
    return {**schema, "items": _any(rng, depth + 1)}


def _mixed(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.5:
        return {"anyOf": [_any(rng, depth + 1) for _ in range(2)]}
    return {"oneOf": [{"type": "string", "maxLength": 4}, {"type": "boolean"}]}


def check_conforms(schema: dict[str, Any], text: str) -> None:
    """Raises what is wrong with `text` as JSON of that schema; formats count."""
    jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(json.loads(text))
