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

    def runs_singly(self, seq: Sequence) -> bool:
        """Whether the sequence's next tokens are pieces of one token each, as they are to its end then."""
        return seq.num_computed >= (seq.num_prompt_tokens if self.continues else 1)

    def num_alike(self, seq: Sequence) -> int:
        """How many of the sequence's next tokens are run in the same way: in pieces as long as may be, or singly."""
        if self.runs_singly(seq):
            return seq.num_uncomputed
        return seq.num_prompt_tokens - seq.num_computed if self.continues else self.first_of(seq)

    def first_of(self, seq: Sequence) -> int:
        """How many tokens the sequence's next piece has, without which it does not get on."""
        if self.runs_singly(seq):
            return 1
        return min(self._border(seq.num_computed), seq.num_prompt_tokens) - seq.num_computed

    def fit(self, seq: Sequence, count: int, most: int, *, is_first: bool) -> int:
        """So many of the sequence's next tokens, all alike, or as many less as make whole pieces.

        Of none it becomes a whole one where there is room for `most` and it is this sequence's turn (`is_first`).
        """
        start = seq.num_computed
        if self.runs_singly(seq) or start + count >= seq.num_prompt_tokens:
            return count
        whole = (start + count) // self.size * self.size - start
        if whole <= 0 and is_first:
            whole = self.first_of(seq)
        return whole if 0 < whole <= most else 0

    def _border(self, at: int) -> int:
        return (at // self.size + 1) * self.size
