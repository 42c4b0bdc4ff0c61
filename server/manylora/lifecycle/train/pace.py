"""How long a training still takes, said from what its steps and evaluations have taken so far."""

from dataclasses import dataclass, field

_ENOUGH_STEPS = 3
_FORWARD_SHARE = 0.5  # of a training step's time, before an evaluation was measured: it has no backward pass


@dataclass(slots=True)
class Pace:
    """Seconds and tokens of this process's steps and evaluations."""

    step_s: list[float] = field(default_factory=list)
    step_tokens: list[int] = field(default_factory=list)
    evaluation_s: list[float] = field(default_factory=list)

    def remaining_s(self, tokens_left: int, evaluations_left: int, evaluation_tokens: int) -> float | None:
        """Seconds to the end; None before there were enough steps to tell.

        The first step also allocates and warms caches, so it is not counted. Steps are of unequal length, so what
        counts is the time for a token.
        """
        if len(self.step_s) < _ENOUGH_STEPS:
            return None
        per_token = sum(self.step_s[1:]) / max(1, sum(self.step_tokens[1:]))
        if self.evaluation_s:
            per_evaluation = sum(self.evaluation_s) / len(self.evaluation_s)
        else:
            per_evaluation = per_token * _FORWARD_SHARE * evaluation_tokens
        return per_token * tokens_left + per_evaluation * evaluations_left


def in_words(seconds: float) -> str:
    """`90` as "1.5 min"."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
