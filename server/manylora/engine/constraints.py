"""What sequences that are held to a grammar add to a step.

What may come next in them is found out beside the model (`grammars.masks`). What must come is taken before the step is
planned, so that it runs together with the token before it; where that is not known in time, when the step has run. A
sequence whose grammar takes longer than a step does gets no token in it, and runs again in the next: nobody waits.
What may come behind each token of a draft is found out beside the step that runs it.
"""

from collections.abc import Iterable
from typing import Final

from manylora.engine.interface import Task
from manylora.engine.model_runner import Outcome
from manylora.engine.sequence import Scheduled, Sequence
from manylora.grammars.compiler import Compiled
from manylora.grammars.masks import Constraint, MaskMaker

__all__ = ["Constraints", "is_late"]

_BEFORE_PLAN_S: Final = 0.001
_BEFORE_SAMPLE_S: Final = 0.02


class Constraints:
    """The sequences of an engine that are held to a grammar. Lives on the engine's thread."""

    def __init__(self, masks: MaskMaker) -> None:
        self._masks = masks
        self._seqs: list[Sequence] = []  # those that have ended leave with the next `due`

    def add(self, seq: Sequence) -> None:
        """Hold a sequence without tokens to its grammar from now on; one that is to have none is held to nothing."""
        compiled, params = seq.params.grammar, seq.params
        if compiled is None or seq.task is not Task.GENERATE:
            return
        assert isinstance(compiled, Compiled), "grammars are made ready by the engine's own compiler"
        seq.constraint = Constraint(
            self._masks,
            compiled,
            one_by_one=params.logprobs is not None or seq.rules is not None,  # what must come may be ruled out
            ends_only_when_complete=params.ignore_eos,
        )
        self._seqs.append(seq)

    def due(self) -> list[Sequence]:
        """Sequences that go on, or end, without the model. The first token comes from a step in any case."""
        if not self._seqs:
            return []
        self._seqs = [seq for seq in self._seqs if seq.constraint is not None]
        begun = [(seq, seq.constraint) for seq in self._seqs if seq.constraint is not None and seq.num_output_tokens]
        self._masks.wait_settled((constraint for _, constraint in begun), _BEFORE_PLAN_S)
        return [seq for seq, constraint in begun if constraint.is_decided]

    def wait(self, scheduled: Iterable[Scheduled]) -> None:
        """For what these need to be sampled, a little."""
        if self._seqs:
            waiting = [item.seq.constraint for item in scheduled if item.samples]
            self._masks.wait_ready([each for each in waiting if each is not None], _BEFORE_SAMPLE_S)

    def close(self) -> None:
        self._masks.close()


def is_late(item: Scheduled, outcome: Outcome) -> bool:
    """What may come was not known in time, so the step has found no token for the sequence."""
    constraint = item.seq.constraint
    return constraint is not None and item.samples and not outcome.token_ids and not constraint.is_decided
