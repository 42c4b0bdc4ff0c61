"""Tokens that are guessed before the model has run: the seam by which a sequence takes more than one in a step.

A draft changes no answer. The model runs its tokens behind the sequence's own and samples at each place as it always
does, with that place's random number; what comes out is taken as far as it agrees with the draft, and one token more.
"""

from collections.abc import Sequence as SequenceOf
from typing import Protocol

from manylora.engine.sequence import Sequence


class Drafter(Protocol):
    """Proposes what comes next. Called on the engine's thread, in each plan, for who reaches its last token in it."""

    def propose(self, seq: Sequence, most: int, num_rows: int) -> SequenceOf[int]:
        """Token ids of the base's vocabulary to try behind `seq.tokens`: at most `most`, none where it knows of none.

        Quick, since every step waits for it. What is drafted takes room that nobody else wants: with few free blocks,
        or while prompts fill the step, less of it is run, or nothing. `num_rows`: sequences in the step.
        """
        ...

    def learn(self, seq: Sequence, num_drafted: int, num_accepted: int) -> None:
        """So much of what was proposed for it was run, and so much was right."""
        ...

    def keep(self, seq: Sequence) -> None:
        """The sequence has ended well, and nothing will be proposed for it any more."""
        ...
