"""The base's tokens as grammars need them: what each one spells, which end an answer, how many rows the model has."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

import llguidance

from manylora.errors import InvalidRequest

__all__ = ["Spelling", "Vocabulary"]

_BEFORE_TEXT: Final = "\x02"  # a character that no tokenizer merges with what comes after it


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`tokenizer` is the JSON of a compiled tokenizer, None where the base has none.

    The model has `num_rows` logits. Those without a token are never allowed, and neither are special tokens that a
    grammar does not name, but for `eos_ids`, where an answer may end.
    """

    tokenizer: str | None
    num_rows: int
    eos_ids: tuple[int, ...]

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Vocabulary":
        fields = json.loads(data)
        return cls(fields["tokenizer"], fields["num_rows"], tuple(fields["eos_ids"]))

    def build(self) -> llguidance.LLTokenizer:
        """The library's own form of it; takes a second for a large one. Raises InvalidRequest."""
        if self.tokenizer is None or not self.eos_ids:
            raise InvalidRequest("This model's tokenizer cannot hold answers to a grammar: it is not a compiled one.")
        try:
            num_tokens = 1 + max(*self._ids(), *self.eos_ids)
            return llguidance.LLTokenizer(
                self.tokenizer, n_vocab=max(self.num_rows, num_tokens), eos_token=list(self.eos_ids)
            )
        except Exception as error:  # the library raises whatever its parts do
            raise InvalidRequest(f"This model's tokenizer cannot hold answers to a grammar: {error}") from error

    def _ids(self) -> list[int]:
        assert self.tokenizer is not None
        described = json.loads(self.tokenizer)
        vocab = described["model"].get("vocab", {})
        ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
        return [-1, *ids, *(token["id"] for token in described.get("added_tokens", ()))]


@dataclass(frozen=True, slots=True)
class Spelling:
    """What the library read out of a vocabulary, as one process tells it another: a row's bytes, and which are no text.

    To read a tokenizer's JSON and sort its tokens takes the library a quarter of a second for 50,000 tokens, in which
    no other thread of Python runs, and a copy of the tokenizer that the server has already. So a process that serves
    nobody reads it, and the server has the library sort the tokens alone, in two parts of a fifth of that time each.
    """

    tokens: list[bytes]
    special_ids: list[int]
    eos_ids: list[int]

    @classmethod
    def of(cls, tokenizer: llguidance.LLTokenizer) -> "Spelling":
        ids = range(tokenizer.vocab_size)
        return cls(
            [tokenizer.decode_bytes([i]) for i in ids],
            [i for i in ids if tokenizer.is_special_token(i)],
            list(tokenizer.eos_tokens),
        )

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "tokens": [token.decode("latin-1") for token in self.tokens]}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Spelling":
        return cls([token.encode("latin-1") for token in fields["tokens"]], fields["special_ids"], fields["eos_ids"])

    def build(self, encode: Callable[[str], list[int]]) -> llguidance.LLTokenizer:
        """The library's form of it, which asks `encode` for the ids of text that must come."""
        wrapped = llguidance.TokenizerWrapper(_Encoder(self, encode))
        bare = llguidance.LLTokenizer(wrapped, n_vocab=len(self.tokens), eos_token=self.eos_ids, slices=[])
        return bare.with_slices(llguidance.LLTokenizer.general_slices())


class _Encoder:
    """A vocabulary in the form that the library's wrapper takes, by its names."""

    bos_token_id = None

    def __init__(self, spelling: Spelling, encode: Callable[[str], list[int]]) -> None:
        self.tokens = spelling.tokens
        self.special_token_ids = spelling.special_ids
        self.eos_token_id = spelling.eos_ids[0]
        self._encode = encode
        # Tokenizers that put a space before the text are asked for the text after something else.
        adds_space = b"".join(self.tokens[i] for i in encode("a")) != b"a"
        self._before = _BEFORE_TEXT if adds_space else ""
        self._num_before = len(encode(self._before)) if adds_space else 0

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            raise TypeError("text is encoded, not bytes")  # so that the library itself parts bytes that are no text
        return self._encode(self._before + text)[self._num_before :]
