"""How many tokens a text takes at least, told from its length, since encoding it takes far longer than looking.

A token stands for a bounded number of characters where nothing of a text can vanish on its way through the tokenizer.
Where something can, such as the spaces between words or a run of unknown characters, any length may fit.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import ceil
from typing import Any

__all__ = ["TextLength"]

_CHUNK_CHARACTERS = 2**16
_COMPOSED = 4  # characters that one of Unicode's composed forms can stand for
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
_KEEP_ALL = {None, "ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "Prepend", "Lowercase", "NFD", "NFKD"}
_DROP_SPACE = {"Whitespace", "WhitespaceSplit", "Strip"}


@dataclass(frozen=True, slots=True)
class TextLength:
    """`characters` are the most that a token stands for, None where there is no such number.

    With `can_drop_space` white space comes on top of them.
    """

    characters: int | None = None
    can_drop_space: bool = False

    @classmethod
    def of(cls, tokenizer: Any) -> "TextLength":
        """Of a `tokenizers.Tokenizer`."""
        added = tokenizer.get_added_tokens_decoder().values()
        steps = [*_steps(tokenizer.normalizer, "normalizers"), *_steps(tokenizer.pre_tokenizer, "pretokenizers")]
        growths = [_characters_for_one(step) for step in steps]
        vocabulary = tokenizer.get_vocab()
        if None in growths or not _has_place_for_all(tokenizer, steps, vocabulary):
            return cls()
        longest = max(map(len, vocabulary), default=1)
        composed = reduce(lambda a, b: a * b, (growth for growth in growths if growth is not None), 1)
        drops = any(step["type"] in _DROP_SPACE for step in steps) or any(
            token.lstrip or token.rstrip for token in added
        )
        return cls(max(1, longest) * composed, drops)

    def surely_exceeds(self, text: str, num_tokens: int) -> bool:
        """Whether `text` has more than `num_tokens` tokens, as far as its length says."""
        if self.characters is None:
            return False
        room = self.characters * num_tokens
        if len(text) <= room or not self.can_drop_space:
            return len(text) > room
        for start in range(0, len(text), _CHUNK_CHARACTERS):
            room -= sum(map(len, text[start : start + _CHUNK_CHARACTERS].split()))
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


def _has_place_for_all(tokenizer: Any, steps: Sequence[dict[str, Any]], vocabulary: dict[str, int]) -> bool:
    """Whether every character comes out as a token: no run of unknown ones becomes a single token, or none."""
    from tokenizers.models import BPE, Unigram
    from tokenizers.pre_tokenizers import ByteLevel

    model = tokenizer.model
    if any(step["type"] == "ByteLevel" for step in steps):
        return isinstance(model, BPE) and vocabulary.keys() >= set(ByteLevel.alphabet())
    if isinstance(model, BPE):
        if model.byte_fallback and vocabulary.keys() >= _BYTES:
            return True
        return model.unk_token is not None and not model.fuse_unk
    if isinstance(model, Unigram):
        return bool(json.loads(tokenizer.to_str())["model"].get("byte_fallback")) and vocabulary.keys() >= _BYTES
    return False
