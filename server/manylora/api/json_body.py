"""A JSON body from a stranger, counted before it is parsed.

Parsing makes an object of every `{}`, holds the interpreter's lock for as long as it takes and needs many times the
body's size. So brackets, commas and strings are counted first, on the bytes, which needs neither.
"""

from typing import Any, Final

import numpy as np
import orjson
from starlette.requests import Request

from manylora.errors import InvalidRequest

__all__ = ["documented", "is_json", "parse_json", "require_json"]

MAX_DEPTH: Final = 64
MAX_CONTAINERS: Final = 16_384
MAX_STRINGS: Final = 65_536
MAX_VALUES: Final = 600_000

# A body of this size stays below the other bounds whatever it holds, and its brackets are counted in no time.
_SURELY_FEW_BYTES: Final = 32_768
_CHUNK_BYTES: Final = 2**18
_QUOTE, _COMMA, _BACKSLASH = b'",\\'
# `[` and `{`, and `]` and `}`, differ in one bit.
_CASE, _OPENING, _CLOSING = 0x20, ord("{"), ord("}")


def is_json(request: Request) -> bool:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"


def require_json(request: Request) -> None:
    """A form of another site cannot declare its body so. Raises InvalidRequest."""
    if not is_json(request):
        raise InvalidRequest("Send the body as JSON, with the header 'content-type: application/json'.")


def parse_json(body: bytes) -> Any:
    """The value that `body` spells. Raises InvalidRequest for what is no JSON, and for too much of it."""
    if not _is_surely_small(body):
        _Count().check(body)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None


def _is_surely_small(body: bytes) -> bool:
    return len(body) <= _SURELY_FEW_BYTES and body.count(b"[") + body.count(b"{") <= MAX_DEPTH


class _Count:
    """What was seen of a body so far. What stands in strings counts for nothing."""

    def __init__(self) -> None:
        self._is_in_string = 0
        self._num_quotes = 0
        self._num_commas = 0
        self._num_containers = 0
        self._depth = 0
        self._deepest = 0

    def check(self, body: bytes) -> None:
        """Raises InvalidRequest at the first bound that is passed."""
        start = 0
        while start < len(body):
            chunk = body[start : start + _CHUNK_BYTES]
            # Whole pairs of backslashes stay together; an odd one at the end goes with the next chunk.
            is_odd = (len(chunk) - len(chunk.rstrip(b"\\"))) % 2 and start + len(chunk) < len(body)
            chunk = chunk[: len(chunk) - is_odd]
            self._add(chunk.replace(b"\\\\", b"").replace(b'\\"', b"") if _BACKSLASH in chunk else chunk)
            start += len(chunk)
            for most, seen, what in (
                (MAX_DEPTH, self._deepest, "levels of nesting"),
                (MAX_CONTAINERS, self._num_containers, "objects and arrays"),
                (MAX_STRINGS, self._num_quotes // 2, "strings and keys"),
                (MAX_VALUES, self._num_commas, "values"),
            ):
                if seen > most:
                    raise InvalidRequest(f"The body has more than {most} {what}, the limit here. Send less.")

    def _add(self, chunk: bytes) -> None:
        """Count a piece without escaped quotes in it."""
        codes = np.frombuffer(chunk, np.uint8)
        quotes = codes == _QUOTE
        num_quotes = int(np.count_nonzero(quotes))
        if num_quotes:
            inside = np.bitwise_xor.accumulate(quotes.view(np.uint8)) ^ self._is_in_string
            codes = codes[inside == 0]
            self._num_quotes += num_quotes
            self._is_in_string ^= num_quotes % 2
        elif self._is_in_string:
            return
        self._num_commas += int(np.count_nonzero(codes == _COMMA))
        folded = codes | _CASE
        opening, closing = folded == _OPENING, folded == _CLOSING
        num_opened, num_closed = int(np.count_nonzero(opening)), int(np.count_nonzero(closing))
        if num_opened:
            levels = np.cumsum(opening.view(np.int8) - closing.view(np.int8), dtype=np.int32)
            self._deepest = max(self._deepest, self._depth + int(levels.max()))
        self._num_containers += num_opened
        self._depth += num_opened - num_closed


def documented(*schemas: str) -> dict[str, Any]:
    """What the OpenAPI document says of a route that parses its body itself: it is of one of these schemas."""
    refs = [{"$ref": f"#/components/schemas/{schema}"} for schema in schemas]
    schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
