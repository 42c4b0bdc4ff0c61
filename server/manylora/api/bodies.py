"""JSON bodies of the routes that change something: small, and strict about what they have."""

from typing import ClassVar, Final, TypeVar

from fastapi import Request
from pydantic import ValidationError

from manylora.api.errors import invalid_from
from manylora.api.fields import wanted
from manylora.api.json_body import parse_json, require_json
from manylora.api.lanes import PYTHON, beside_loop
from manylora.api.strict import Strict
from manylora.errors import InvalidRequest, TooLarge

__all__ = ["Body", "read_body"]

MAX_JSON_BYTES: Final = 2**20
_INLINE_BYTES: Final = 16_384


class Body(Strict):
    """A JSON body: unknown fields are refused, a string is no number, null is absent or, as in a merge, a value."""

    null_is_a_value: ClassVar[bool] = False


B = TypeVar("B", bound=Body)


async def read_body(request: Request, schema: type[B]) -> B:
    """Raises InvalidRequest naming the field at fault, or TooLarge."""
    require_json(request)
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_JSON_BYTES:
            raise TooLarge(f"A JSON body may have {MAX_JSON_BYTES} bytes here.")
    if len(data) <= _INLINE_BYTES:
        return _parsed(bytes(data), schema)
    return await beside_loop(PYTHON, _parsed, bytes(data), schema)


def _parsed(data: bytes, schema: type[B]) -> B:
    raw = parse_json(data)
    if not isinstance(raw, dict):
        raise InvalidRequest("The body must be a JSON object.")
    try:
        given = wanted(raw, schema.model_fields, {})
        nulls = [name for name in raw if raw[name] is None and name in schema.model_fields]
        return schema.model_validate(given | (dict.fromkeys(nulls) if schema.null_is_a_value else {}))
    except ValidationError as error:
        raise invalid_from(error.errors(include_url=False, include_input=False)) from None
