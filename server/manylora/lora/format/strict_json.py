"""JSON from strangers: what `json` lets pass and an adapter must not contain is an error here."""

import json
import math
from typing import Any

MAX_DEPTH = 16


class JsonFault(ValueError):
    """The bytes are not the JSON object that they should be; the message says why."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JsonFault(f"the key {twice[:80]!r} stands twice in one object")
    return result


def _no_constant(name: str) -> float:
    raise JsonFault(f"{name} is not JSON")


def _check(value: Any) -> None:
    """No number beyond a double, no text that UTF-8 cannot carry, no deep nesting."""
    todo: list[tuple[Any, int]] = [(value, 1)]
    while todo:
        item, depth = todo.pop()
        if depth > MAX_DEPTH:
            raise JsonFault(f"it is nested more than {MAX_DEPTH} deep")
        if isinstance(item, dict):
            todo += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list):
            todo += [(part, depth + 1) for part in item]
        elif isinstance(item, float) and not math.isfinite(item):
            raise JsonFault("a number is too large for a double")
        elif isinstance(item, str) and not item.isascii():
            try:
                item.encode()
            except UnicodeEncodeError as error:
                raise JsonFault("a text holds half of a surrogate pair") from error


def loads(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`.

    Raises JsonFault for anything else: not UTF-8, not an object, duplicate keys, NaN or Infinity, numbers
    that do not fit, lone surrogates, nesting deeper than `MAX_DEPTH`.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except JsonFault:
        raise
    except UnicodeDecodeError as error:
        raise JsonFault(f"it is not UTF-8 (byte {error.start})") from error
    except RecursionError as error:
        raise JsonFault(f"it is nested more than {MAX_DEPTH} deep") from error
    except ValueError as error:
        raise JsonFault(str(error)[:120]) from error
    if not isinstance(value, dict):
        raise JsonFault(f"it is a {type(value).__name__}, not an object")
    _check(value)
    return value
