"""What an adapter's tokenizer adds: the added tokens of `tokenizer.json`, and which one ends an answer.

Nothing else of these files is looked at, and nothing that is wrong with them is a reason to refuse an adapter: it is
then served with the base's tokenizer, as it is without them, and its report says so.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import orjson

from manylora.identity import OWN_TOKENS_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, OwnToken
from manylora.lora.format.outline import members_of, outline_of

__all__ = [
    "MAX_LISTED_BYTES",
    "MAX_OUTLINE_BYTES",
    "MAX_TOKENIZER_BYTES",
    "MAX_TOKEN_BYTES",
    "AddedTokens",
    "read_added_tokens",
]

MAX_TOKENIZER_BYTES: Final = 67_108_864
# What is parsed at once holds up every other thread of the server meanwhile.
MAX_OUTLINE_BYTES: Final = 131_072
MAX_LISTED_BYTES: Final = 4_194_304
MAX_TOKEN_BYTES: Final = 8_192
_FLAGS: Final = ("special", "single_word", "lstrip", "rstrip", "normalized")
_SPACE: Final = b" \t\r\n"
_NONE: Final = "has added tokens that are none"


class _Unusable(Exception):
    """What is wrong with a file, in words that go on after its name."""

    def add_to(self, warnings: list[str], path: Path) -> None:
        warnings.append(f"{path.name} {self}. The base's own tokenizer is used.")


@dataclass(frozen=True, slots=True)
class AddedTokens:
    """All tokens that a tokenizer was given beside its model's, the base's among them; and the text of its last one."""

    tokens: tuple[OwnToken, ...] = ()
    end: str | None = None


def read_added_tokens(folder: Path, warnings: list[str]) -> AddedTokens:
    """Of the tokenizer's files in a folder; none where there are none, or with a warning where they cannot be read."""
    path = folder / OWN_TOKENS_FILE
    kept = _members(path, warnings)
    if kept is not None:  # of a download: the base has all others
        tokens = _tokens(path, kept.get("tokens"), warnings)
        return AddedTokens(tokens, next((each.content for each in tokens if each.id == kept.get("end_id")), None))
    path = folder / TOKENIZER_FILE
    found = _members(path, warnings)
    if found is None:
        return AddedTokens()
    tokens = _tokens(path, found["added_tokens"], warnings) if "added_tokens" in found else ()
    config = _members(folder / TOKENIZER_CONFIG_FILE, warnings) or {}
    return AddedTokens(tokens, _end(folder / TOKENIZER_CONFIG_FILE, config.get("eos_token")))


def _members(path: Path, warnings: list[str]) -> dict[str, Any] | None:
    """What a file's object has on its first level, with places in place of what lies deeper; None for no such file."""
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        _Unusable(f"has more than {MAX_TOKENIZER_BYTES} bytes and was not read").add_to(warnings, path)
        return None
    try:
        with path.open("rb") as file:
            return members_of(outline_of(file, MAX_OUTLINE_BYTES))
    except ValueError:
        _Unusable("is no JSON object of a tokenizer").add_to(warnings, path)
        return None


def _tokens(path: Path, place: Any, warnings: list[str]) -> tuple[OwnToken, ...]:
    try:
        return tuple(_listed(path, place))
    except _Unusable as error:
        error.add_to(warnings, path)
    except ValueError:
        _Unusable(_NONE).add_to(warnings, path)
    return ()


def _listed(path: Path, place: Any) -> Iterator[OwnToken]:
    """The tokens of a list, each parsed by itself. Raises _Unusable or ValueError."""
    text = _part(path, place, MAX_LISTED_BYTES, "of added tokens")
    outline = outline_of(BytesIO(text), MAX_OUTLINE_BYTES)
    if outline.text.translate(None, _SPACE) != b"[" + b",".join([b"{}"] * len(outline.inner)) + b"]":
        raise _Unusable(_NONE)
    for begin, end in outline.inner:
        if end - begin > MAX_TOKEN_BYTES:
            raise _Unusable(f"has an added token of more than {MAX_TOKEN_BYTES} bytes")
        yield _token(orjson.loads(text[begin:end]))


def _part(path: Path, place: Any, most: int, what: str) -> bytes:
    """What a file has in a place that `_members` found. Raises _Unusable."""
    if not isinstance(place, tuple):
        raise _Unusable(_NONE)
    begin, end = place
    if end - begin > most:
        raise _Unusable(f"has more than {most} bytes {what}")
    with path.open("rb") as file:
        file.seek(begin)
        return file.read(end - begin)


def _end(path: Path, said: Any) -> str | None:
    """The text of the token that a configuration names as the last one: a text, or an object that has it."""
    if isinstance(said, tuple):
        try:
            said = orjson.loads(_part(path, said, MAX_TOKEN_BYTES, "of one token"))
        except (_Unusable, ValueError):
            return None
        said = said.get("content") if isinstance(said, dict) else None
    return said if isinstance(said, str) else None


def _token(raw: dict[str, Any]) -> OwnToken:
    """Raises _Unusable."""
    number, content = raw.get("id"), raw.get("content")
    flags = {name: raw.get(name, False) for name in _FLAGS}
    if type(number) is not int or not 0 <= number < 2**31 or not isinstance(content, str) or not content:
        raise _Unusable(_NONE)
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise _Unusable(_NONE)
    return OwnToken(number, content, **flags)
