"""How prompts are cut where layers keep a state: so that a sequence's numbers do not depend on where steps end."""

from dataclasses import dataclass

from manylora.engine.sequence import Sequence

__all__ = ["Pieces"]


@dataclass(frozen=True, slots=True)
class Pieces:
    """Layers with a state run a prompt in pieces that end at multiples of `size`, and an answer token by token.

    Several tokens at once are summed in another order than one after the other. With `continues` false, such layers
    take several tokens at a sequence's beginning alone, and single ones behind its first piece.
    """

    size: int
    continues: bool = True

    def cut(self, seq: Sequence, start: int, end: int) -> tuple[int, ...]:
        """The sizes of the pieces of the sequence's tokens [start, end)."""
        sizes = []
        at = start
        while at < end:
            is_whole = at < seq.num_prompt_tokens and (self.continues or not at)
            until = min(self._border(at), end, seq.num_prompt_tokens) if is_whole else at + 1
            sizes.append(until - at)
            at = until
        return tuple(sizes)

    def fit(self, seq: Sequence, count: int, most: int, *, is_first: bool) -> int:
        """So many of the sequence's next tokens, or as many less as make whole pieces.

        Of none it becomes a whole one where there is room for `most` and it is this sequence's turn (`is_first`).
        """
        start, end = seq.num_computed, seq.num_prompt_tokens
        if start + count >= end:
            return count
        whole = (start + count) // self.size * self.size - start
        if whole <= 0 and is_first:
            whole = min(self._border(start), end) - start
        return whole if 0 < whole <= most else 0

    def _border(self, at: int) -> int:
        return (at // self.size + 1) * self.size
