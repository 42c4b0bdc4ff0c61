"""Two texts as one prompt, as a tokenizer joins them. No torch."""

from dataclasses import dataclass

__all__ = ["EncodedPair"]


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Two texts as one prompt.

    `second_from`: the place from which tokens are of the second text as far as the model is told (BERT's token types),
    0 where it is not. `second` are the places of that text's own tokens, and `offsets` where each of them begins and
    ends in it, in characters.
    """

    ids: tuple[int, ...]
    second_from: int
    second: range
    offsets: tuple[tuple[int, int], ...]

    def cut(self, num_tokens: int) -> "EncodedPair":
        """With the end of the second text left out, so that there are at most so many, as far as that goes."""
        over = min(len(self.ids) - num_tokens, len(self.second))
        if over <= 0:
            return self
        kept = self.second[: len(self.second) - over]
        ids = (*self.ids[: kept.stop], *self.ids[self.second.stop :])
        return EncodedPair(ids, self.second_from, kept, self.offsets[: len(kept)])
