"""What an adapter's tokenizer adds: the added tokens of `tokenizer.json`, and which one ends an answer.

Nothing else of these files is looked at, and nothing that is wrong with them is a reason to refuse an adapter: it is
then served with the base's tokenizer, as it is without them, and its report says so.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from manylora.identity import OWN_TOKENS_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, OwnToken

__all__ = ["MAX_TOKENIZER_BYTES", "AddedTokens", "read_added_tokens"]

MAX_TOKENIZER_BYTES: Final = 67_108_864
_CONFIG_BYTES: Final = 2**20
_KEPT_BYTES: Final = 2**23  # more than as many of the longest tokens take as are ever kept
_FLAGS: Final = ("special", "single_word", "lstrip", "rstrip", "normalized")


@dataclass(frozen=True, slots=True)
class AddedTokens:
    """All tokens that a tokenizer was given beside its model's, the base's among them; and the text of its last one."""

    tokens: tuple[OwnToken, ...] = ()
    end: str | None = None


def read_added_tokens(folder: Path, warnings: list[str]) -> AddedTokens:
    """Of the tokenizer's files in a folder; none where there are none, or with a warning where they cannot be read."""
    kept = _object(folder / OWN_TOKENS_FILE, _KEPT_BYTES, warnings)
    if kept is not None:  # of a download: the base has all others
        tokens = _tokens(kept.get("tokens"), OWN_TOKENS_FILE, warnings)
        return AddedTokens(tokens, next((each.content for each in tokens if each.id == kept.get("end_id")), None))
    raw = _object(folder / TOKENIZER_FILE, MAX_TOKENIZER_BYTES, warnings)
    if raw is None:
        return AddedTokens()
    tokens = _tokens(raw.get("added_tokens", []), TOKENIZER_FILE, warnings)
    config = _object(folder / TOKENIZER_CONFIG_FILE, _CONFIG_BYTES, warnings) or {}
    end = config.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    return AddedTokens(tokens, end if isinstance(end, str) else None)


def _tokens(listed: Any, name: str, warnings: list[str]) -> tuple[OwnToken, ...]:
    found = [_token(each) for each in listed] if isinstance(listed, list) else [None]
    if any(token is None for token in found):
        warnings.append(f"{name} has added tokens that are none. The base's own tokenizer is used.")
        return ()
    return tuple(token for token in found if token is not None)


def _object(path: Path, most: int, warnings: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    if path.stat().st_size > most:
        warnings.append(f"{path.name} has more than {most} bytes and was not read. The base's own tokenizer is used.")
        return None
    try:
        found = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        warnings.append(f"{path.name} is no JSON object. The base's own tokenizer is used.")
        return None
    return found


def _token(raw: Any) -> OwnToken | None:
    if not isinstance(raw, dict):
        return None
    number, content = raw.get("id"), raw.get("content")
    flags = {name: raw.get(name, False) for name in _FLAGS}
    if type(number) is not int or not 0 <= number < 2**31 or not isinstance(content, str) or not content:
        return None
    return OwnToken(number, content, **flags) if all(isinstance(flag, bool) for flag in flags.values()) else None
