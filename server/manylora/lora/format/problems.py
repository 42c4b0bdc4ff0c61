"""Collects everything that is wrong with an adapter, so that its owner reads it all in one answer."""

from collections import Counter

from manylora.errors import InvalidAdapter, Problem
from manylora.identity import TENSOR_FILE

# A hostile file can be wrong a million times over; the answer to it stays readable.
MAX_PER_CODE = 50
_MAX_SHOWN = 120


def shown(value: object) -> str:
    """A stranger's value as it may stand in a message: quoted, escaped, of bounded length."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def listed(values: list[str], most: int = 8) -> str:
    """The first few of a list, quoted, with a count of the rest."""
    rest = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(shown(v) for v in values[:most]) + rest


class Problems:
    """An append-only list of `Problem`, with at most `MAX_PER_CODE` of each code and a count of the others."""

    def __init__(self) -> None:
        self._found: list[Problem] = []
        self._counts: Counter[str] = Counter()

    def add(self, code: str, where: str, message: str) -> None:
        self._counts[code] += 1
        if self._counts[code] <= MAX_PER_CODE:
            self._found.append(Problem(code, where, message))

    def has(self, *codes: str) -> bool:
        return any(self._counts[code] for code in codes)

    def __bool__(self) -> bool:
        return bool(self._found)

    def all(self) -> list[Problem]:
        """What was found, in order, then one line for each code that was cut off."""
        more = [
            Problem(code, TENSOR_FILE, f"{count - MAX_PER_CODE} more problems of this kind are not listed.")
            for code, count in self._counts.items()
            if count > MAX_PER_CODE
        ]
        return self._found + more

    def raise_if_any(self) -> None:
        if self._found:
            raise InvalidAdapter(self.all())
