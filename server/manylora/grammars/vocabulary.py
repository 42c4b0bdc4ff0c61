"""The base's tokens as grammars need them: what each one spells, which end an answer, how many rows the model has."""

import json
from dataclasses import asdict, dataclass

import llguidance

from manylora.errors import InvalidRequest

__all__ = ["Vocabulary"]


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
