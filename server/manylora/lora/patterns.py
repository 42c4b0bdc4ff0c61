"""Regular expressions out of an uploaded config, matched as PEFT matches them but under limits.

PEFT hands such patterns to `re`, where a short one can run for years (`(a|aa)+$`). Here a pattern must be
valid for `re`, is then run by the library `regex`, which can stop at a deadline and lets other threads run
meanwhile, and has its counted repeats bounded, since `regex` unrolls them when it compiles.
"""

import re
import time
from collections.abc import Iterable
from functools import lru_cache
from math import prod

import regex

from manylora.lora.problems import shown

MAX_PATTERN_LENGTH = 8192
MAX_PATTERNS_LENGTH = 65536
MAX_REPEAT = 1000
BUDGET_S = 1.0

_COUNTED = re.compile(r"\{([0-9]*)(,?)([0-9]*)\}")
# Only name characters and dots (as wildcards or escaped), as PEFT's own tools write them.
_PLAIN = re.compile(r"\^?((?:[A-Za-z0-9_-]|\\?\.)+)\$?", re.ASCII)


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
        _check_repeats(pattern)
        try:
            re.compile(pattern)
            compiled: regex.Pattern[str] = regex.compile(pattern)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise PatternFault(f"{shown(pattern)} is not a regular expression: {error}") from error
        self._compiled[pattern] = compiled
        return compiled

    def _run(self, pattern: str, text: str, *, whole: bool) -> "regex.Match[str] | None":
        compiled = self._compile(pattern)
        started = time.monotonic()
        try:
            run = compiled.fullmatch if whole else compiled.match
            return run(text, timeout=max(self._left_s, 1e-6), concurrent=True)
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

    def names(self, key: str, path: str) -> bool:
        """Whether `key` of a rank or alpha pattern means `path`, as by `re.match(rf"(.*\\.)?({key})$", path)`.

        Raises PatternFault.
        """
        plain = _plain_key(key)
        if plain is None:
            return self._run(rf"(.*\.)?({key})$", path, whole=False) is not None
        return _plain_match(plain, path, anchored=key.startswith("^"))


class KeyTable:
    """The keys of a rank or alpha pattern, ready to be asked for many paths.

    EVA writes one key per module, so looking at every key for every module would take the square of their
    number; plain keys are sorted by the end that a path must have.
    """

    def __init__(self, keys: Iterable[str], patterns: Patterns) -> None:
        self._patterns = patterns
        self._by_tail: dict[str, list[tuple[int, str]]] = {}
        for order, key in enumerate(keys):
            plain = _plain_key(key)
            self._by_tail.setdefault(plain[1] if plain else "", []).append((order, key))

    def first(self, path: str) -> str | None:
        """The first key that means `path`, in the order of the file, as PEFT takes it. Raises PatternFault."""
        candidates = sorted(item for tail, keys in self._by_tail.items() if path.endswith(tail) for item in keys)
        return next((key for _, key in candidates if self._patterns.names(key, path)), None)


@lru_cache(maxsize=4096)
def _plain_key(key: str) -> tuple[str, str] | None:
    """The key with its wildcards as NUL, and its last literal part; None where it is a real expression."""
    match = _PLAIN.fullmatch(key)
    if match is None:
        return None
    text = match[1].replace(r"\.", "\1").replace(".", "\0").replace("\1", ".")
    return text, re.split(r"[.\0]", text)[-1]


def _plain_match(plain: tuple[str, str], path: str, *, anchored: bool) -> bool:
    text, tail = plain
    extra = len(path) - len(text)
    if extra < 0 or not path.endswith(tail) or (extra and (anchored or path[extra - 1] != ".")):
        return False
    return all(want in (have, "\0") for want, have in zip(text, path[extra:], strict=True))
