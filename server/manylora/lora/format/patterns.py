"""Regular expressions out of an uploaded config, matched as PEFT matches them but under limits.

PEFT hands such patterns to `re`, where a short one can run for years (`(a|aa)+$`). Here a pattern must be
valid for `re`, is then run by the library `regex`, which can stop at a deadline and lets other threads run
meanwhile, and has its counted repeats bounded, since `regex` unrolls them when it compiles. `re` in turn walks through
every character of a set where case is ignored, so a pattern is ASCII, as the names of modules are.

Plain names are no expressions: however many there are, they are looked up and not tried one by one.
"""

import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from math import prod

import regex

from manylora.lora.format.problems import shown

MAX_PATTERN_LENGTH = 8192
MAX_PATTERNS_LENGTH = 65536
MAX_REPEAT = 1000
MAX_EXPRESSIONS = 128
# Of plain keys, by length and the places of their dots: a base's own names have a few dozen.
MAX_KEY_SHAPES = 256
BUDGET_S = 1.0

_COUNTED = re.compile(r"\{([0-9]*)(,?)([0-9]*)\}")
# Only name characters and dots (as wildcards or escaped), as PEFT's own tools write them.
_PLAIN = re.compile(r"\^?((?:[A-Za-z0-9_-]|\\?\.)+)\$?", re.ASCII)
_BEYOND_ASCII = re.compile(r"(?<!\\)(?:\\\\)*\\[uUN]|[^\x00-\x7f]")


class PatternFault(ValueError):
    """A pattern that is not valid, or too costly; the message says why and what to do."""


def _check_repeats(pattern: str) -> None:
    counts = _COUNTED.findall(pattern)
    if len(counts) != pattern.count("{"):
        raise PatternFault(f"{shown(pattern)}: a '{{' that does not begin a repeat like {{2,3}} is not supported")
    if prod(max(int(n[:9] or 1), 1) for low, _, high in counts for n in (low, high)) > MAX_REPEAT:
        raise PatternFault(f"{shown(pattern)}: its counted repeats multiply to more than {MAX_REPEAT}; simplify it")


class Patterns:
    """Compiles and runs the patterns of one adapter within one budget of time and length."""

    def __init__(self, budget_s: float = BUDGET_S) -> None:
        self._compiled: dict[str, regex.Pattern[str]] = {}
        self._length = 0
        self._left_s = budget_s

    def _compile(self, pattern: str) -> "regex.Pattern[str]":
        known = self._compiled.get(pattern)
        if known is not None:
            return known
        self._length += len(pattern)
        if len(pattern) > MAX_PATTERN_LENGTH or self._length > MAX_PATTERNS_LENGTH:
            raise PatternFault(f"{shown(pattern)}: the patterns are too long; list the module names instead")
        if len(self._compiled) >= MAX_EXPRESSIONS:
            raise PatternFault(f"more than {MAX_EXPRESSIONS} regular expressions; write plain module names instead")
        if _BEYOND_ASCII.search(pattern):
            raise PatternFault(f"{shown(pattern)}: only ASCII is taken in a pattern, as in the names of modules")
        if "[:" in pattern:  # to `regex` a class of characters, to `re` a set like any other
            raise PatternFault(f"{shown(pattern)}: '[:' is not taken in a pattern; spell the characters out")
        _check_repeats(pattern)
        try:
            re.compile(pattern)
            compiled: regex.Pattern[str] = regex.compile(pattern)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise PatternFault(f"{shown(pattern)} is not a regular expression: {error}") from error
        self._compiled[pattern] = compiled
        return compiled

    def _run(self, pattern: str, text: str, *, whole: bool) -> "regex.Match[str] | None":
        started = time.monotonic()
        try:
            compiled = self._compile(pattern)
            left_s = self._left_s - (time.monotonic() - started)
            run = compiled.fullmatch if whole else compiled.match
            return run(text, timeout=max(left_s, 1e-6), concurrent=True)
        except (TimeoutError, MemoryError) as error:
            raise PatternFault(f"{shown(pattern)} takes too long to match; list the module names instead") from error
        finally:
            self._left_s -= time.monotonic() - started

    def fullmatch(self, pattern: str, path: str) -> bool:
        """Whether `pattern` matches all of `path`, as in `target_modules`. Raises PatternFault."""
        return self._run(pattern, path, whole=True) is not None

    def layer_index(self, pattern: str | None, path: str) -> int | None:
        """The number of the layer that `path` lies in, under a list named by `pattern` (None: any).

        The first number counts: in `layers.1.experts.0` it is 1. Raises PatternFault.
        """
        if pattern is None:
            match = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", path)
        else:
            match = self._run(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", path, whole=False)
        return int(match["idx"]) if match else None

    def ends_in(self, key: str, path: str) -> bool:
        """Whether `path` is, or ends after a dot in, what the expression `key` matches. Raises PatternFault."""
        return self._run(rf"(.*\.)?({key})$", path, whole=False) is not None


def suffixes(path: str) -> Iterator[str]:
    """The path and what follows each of its dots: what a name in a list may be to mean it."""
    yield path
    while "." in path:
        path = path.partition(".")[2]
        yield path


class KeyTable:
    """The keys of a rank or alpha pattern, ready to be asked for many paths.

    A key means `path` by `re.match(rf"(.*\\.)?({key})$", path)`, so a dot in it that is not escaped is any character.
    EVA writes one key per module: looking at every key for every module would take the square of their number. Plain
    keys are found by what they are without their wildcards, so a path costs as much as the keys have shapes.
    """

    def __init__(self, keys: Iterable[str], patterns: Patterns) -> None:
        self._patterns = patterns
        self._keys = list(keys)
        self._expressions: list[int] = []
        # Length of the key -> where its wildcards are -> (the rest of it, whether it is a whole path) -> first of them.
        self._plain: dict[int, dict[tuple[int, ...], dict[tuple[str, bool], int]]] = defaultdict(dict)
        num_shapes = 0
        for order, key in enumerate(self._keys):
            match = _PLAIN.fullmatch(key)
            if match is None:
                self._expressions.append(order)
                continue
            text = match[1].replace(r"\.", "\0")
            wildcards = tuple(found.start() for found in re.finditer(r"\.", text))
            shapes = self._plain[len(text)]
            num_shapes += wildcards not in shapes
            if num_shapes > MAX_KEY_SHAPES:
                raise PatternFault(f"the keys have more than {MAX_KEY_SHAPES} shapes; name modules of the base")
            literal = _without(text.replace("\0", "."), wildcards)
            shapes.setdefault(wildcards, {}).setdefault((literal, key.startswith("^")), order)

    def first(self, path: str) -> str | None:
        """The first key that means `path`, in the order of the file, as PEFT takes it. Raises PatternFault."""
        best = min(self._plain_matches(path), default=len(self._keys))
        for order in self._expressions:
            if order > best:
                break
            if self._patterns.ends_in(self._keys[order], path):
                return self._keys[order]
        return self._keys[best] if best < len(self._keys) else None

    def _plain_matches(self, path: str) -> Iterator[int]:
        for suffix in suffixes(path):
            for wildcards, table in self._plain.get(len(suffix), {}).items():
                literal = _without(suffix, wildcards)
                for is_whole in (False, True) if suffix is path else (False,):
                    order = table.get((literal, is_whole))
                    if order is not None:
                        yield order


def is_order_free(table: Mapping[str, object]) -> bool:
    """Whether the table means the same in any order of its keys: what the first key for a path says, any key says.

    False where that cannot be seen: expressions may mean anything.
    """
    keys = list(table)
    if not all(map(_PLAIN.fullmatch, keys)):
        return len({repr(value) for value in table.values()}) < 2
    try:
        ways = [KeyTable(order, Patterns()) for order in (keys, reversed(keys))]
        # Of two plain keys that both mean a path, one is the end of the other.
        for path in (key.strip("^$").replace("\\", "") for key in keys):
            first, last = (way.first(path) for way in ways)
            if first is not None and last is not None and table[first] != table[last]:
                return False
    except PatternFault:
        return False
    return True


def _without(text: str, places: tuple[int, ...]) -> str:
    """The text with NUL at these places."""
    if not places:
        return text
    return "\0".join(text[start + 1 : stop] for start, stop in pairwise((-1, *places, len(text))))
