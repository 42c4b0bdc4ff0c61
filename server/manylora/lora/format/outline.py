"""A JSON text of a stranger's, of which a small part is wanted: its first level, without the rest being built.

A parser builds all, which of 64 MiB can take seconds and gigabytes, with the interpreter's lock held. Here a text is
gone through in chunks by operations on whole arrays, whatever it holds; what lies deeper than in one list or object is
left out, and what is left over is small.

    {"a": 1, "b": [2, {"c": 3}], "d": {"e": []}}   →   {"a": 1, "b": [], "d": {}}
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import numpy as np

__all__ = ["NoOutline", "Outline", "members_of", "outline_of"]

_CHUNK_BYTES: Final = 65_536
_QUOTE: Final = ord('"')
_STEPS: Final = np.zeros(256, dtype=np.int8)  # how much deeper each byte leads
_STEPS[[ord("["), ord("{")]], _STEPS[[ord("]"), ord("}")]] = 1, -1


class NoOutline(ValueError):
    """A text has too much on its first level, or is no object."""


@dataclass(frozen=True, slots=True)
class Outline:
    """A text without what lies in lists and objects within its first; and where those lie, from their first byte on to
    behind their last.
    """

    text: bytes
    inner: Sequence[tuple[int, int]]


def outline_of(file: BinaryIO, most: int) -> Outline:
    """Of a text from where `file` stands to its end. Raises ValueError where more than `most` bytes would be left.

    Only quotes and brackets are looked at: whether the text is JSON, who parses what is left finds out.
    """
    parts: list[bytes] = []
    begins: list[int] = []
    ends: list[int] = []
    depth, is_inside, at, num_left = 0, 0, file.tell(), 0
    while chunk := file.read(_CHUNK_BYTES):
        while (len(chunk) - len(chunk.rstrip(b"\\"))) % 2 and (more := file.read(1)):
            chunk += more  # what a backslash stands before
        plain = np.frombuffer(chunk.replace(b"\\\\", b"__").replace(b'\\"', b"__"), dtype=np.uint8)
        inside = (np.cumsum(plain == _QUOTE) + is_inside) & 1
        steps = _STEPS[plain] * (1 - inside)
        depths = np.cumsum(steps) + depth
        opens = (steps == 1) & (depths == 2)
        begins += (np.flatnonzero(opens) + at).tolist()
        ends += (np.flatnonzero((steps == -1) & (depths == 1)) + at + 1).tolist()
        parts.append(np.frombuffer(chunk, dtype=np.uint8)[opens | (depths <= 1)].tobytes())
        num_left += len(parts[-1])
        if num_left > most:
            raise NoOutline("too much lies on the first level")
        depth, is_inside, at = int(depths[-1]), int(inside[-1]), at + len(chunk)
    return Outline(b"".join(parts), list(zip(begins, ends, strict=False)))


def members_of(outline: Outline) -> dict[str, Any]:
    """What an object has on its first level; of lists and objects in it, their places. Raises ValueError for no object.

    Of a name that occurs twice the last counts.
    """
    found = json.loads(outline.text.decode(), object_pairs_hook=tuple)  # an object as a tuple, a list as a list
    if not isinstance(found, tuple):
        raise NoOutline("it is no object")
    places = iter(outline.inner)
    return {name: next(places) if isinstance(value, tuple | list) else value for name, value in found}
