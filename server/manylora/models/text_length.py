"""How many tokens a text takes at least, told from its length, since encoding it takes far longer than looking.

A token stands for a bounded number of characters where nothing of a text can vanish on its way through the tokenizer.
Where something can, such as the spaces between words or a run of unknown characters, any length may fit.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, reduce
from math import ceil
from typing import Any

__all__ = ["TextLength", "byte_of_character"]

_CHUNK_CHARACTERS = 2**16
_COMPOSED = 4  # characters that one of Unicode's composed forms can stand for
_MOST_COMPOSED = 64  # of several steps one after the other
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
_CONTINUATION = bytes(range(0x80, 0xC0))  # of a character in UTF-8, after its first byte
_KEEP_ALL = {"ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "Prepend", "Lowercase", "NFD", "NFKD"}
_DROP_SPACE = {"Whitespace", "WhitespaceSplit", "Strip"}


@dataclass(frozen=True, slots=True)
class TextLength:
    """`characters` are the most that a token stands for, None where there is no such number.

    With `can_drop_space` white space comes on top of them, and so do characters whose first byte in UTF-8 is one of
    `dropped`: a byte-level vocabulary that was trained may lack a few control characters.
    """

    characters: int | None = None
    can_drop_space: bool = False
    dropped: bytes = b""

    @classmethod
    def of(cls, tokenizer: Any) -> "TextLength":
        """The bound that holds for a `tokenizers.Tokenizer`."""
        added = tokenizer.get_added_tokens_decoder().values()
        steps = [*_steps(tokenizer.normalizer, "normalizers"), *_steps(tokenizer.pre_tokenizer, "pretokenizers")]
        growths = [_characters_for_one(step) for step in steps]
        vocabulary = tokenizer.get_vocab()
        dropped = _dropped_bytes(tokenizer, steps, vocabulary)
        if None in growths or dropped is None:
            return cls()
        longest = max(map(len, vocabulary), default=1)
        composed = reduce(lambda a, b: a * b, (growth for growth in growths if growth is not None), 1)
        drops = any(step["type"] in _DROP_SPACE for step in steps) or any(
            token.lstrip or token.rstrip for token in added
        )
        return cls(max(1, longest) * composed, drops, dropped)

    def with_tokens(self, texts: Iterable[str]) -> "TextLength":
        """The bound with some more tokens, none of which need to be longer than the others."""
        if self.characters is None:
            return self
        longest = max(map(len, texts), default=0)
        return replace(self, characters=max(self.characters, _MOST_COMPOSED * longest), can_drop_space=True)

    def surely_exceeds(self, text: str, num_tokens: int) -> bool:
        """Whether `text` has more than `num_tokens` tokens, as far as its length says."""
        if self.characters is None:
            return False
        room = self.characters * num_tokens
        if len(text) <= room or not (self.can_drop_space or self.dropped):
            return len(text) > room
        uncounted = _CONTINUATION + self.dropped
        for start in range(0, len(text), _CHUNK_CHARACTERS):
            chunk = text[start : start + _CHUNK_CHARACTERS]
            if self.can_drop_space:
                chunk = "".join(chunk.split())
            room -= len(chunk.encode(errors="replace").translate(None, uncounted)) if self.dropped else len(chunk)
            if room < 0:
                return True
        return False


def _steps(part: Any, inner: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences taken apart."""
    if part is None:
        return []
    return _flat(json.loads(part.__getstate__()), inner)


def _flat(step: dict[str, Any], inner: str) -> list[dict[str, Any]]:
    return [each for one in step[inner] for each in _flat(one, inner)] if step["type"] == "Sequence" else [step]


def _characters_for_one(step: dict[str, Any]) -> int | None:
    """How many characters the step can turn into one, white space aside; None where it can drop some."""
    kind = step["type"]
    if kind in _KEEP_ALL or kind in _DROP_SPACE:
        return 1
    if kind in ("NFC", "NFKC"):
        return _COMPOSED
    if kind == "Replace" and "String" in step["pattern"] and step["content"]:
        return max(1, ceil(len(step["pattern"]["String"]) / len(step["content"])))
    if kind in ("Split", "Punctuation") and step["behavior"] != "Removed":
        return 1
    return None


def _dropped_bytes(tokenizer: Any, steps: Sequence[dict[str, Any]], vocabulary: dict[str, int]) -> bytes | None:
    """The first bytes of characters that may vanish; None where others may, or become one token in any number."""
    from tokenizers.models import BPE, Unigram

    model = tokenizer.model
    if any(step["type"] == "ByteLevel" for step in steps):
        missing = bytes(byte for sign, byte in byte_of_character().items() if sign not in vocabulary)
        return missing if isinstance(model, BPE) and not set(missing) & set(_CONTINUATION) else None
    if isinstance(model, BPE):
        has_all = model.byte_fallback and vocabulary.keys() >= _BYTES
        return b"" if has_all or (model.unk_token is not None and not model.fuse_unk) else None
    if isinstance(model, Unigram):
        falls_back = bool(json.loads(tokenizer.to_str())["model"].get("byte_fallback"))
        return b"" if falls_back and vocabulary.keys() >= _BYTES else None
    return None


@cache
def byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable bytes stand for themselves, the others for characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
