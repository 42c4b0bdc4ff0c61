"""How much one step takes on: so many tokens, and of prompts no more than keeps the step short.

Everybody in the batch waits for the step, so the gap between two tokens of a stream is what a step takes. A token deep
in a long prompt costs several times what one at its beginning does, since its attention reads all that came before.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Final

from manylora.engine.pieces import Pieces
from manylora.engine.sequence import Sequence

# Of the tokens of a step, for prompts while others take a token in each step: beside few, whom each token of a prompt
# keeps waiting by a good part of their own step, half of what they take beside many, whose step is long anyway.
_SHARE_BESIDE_FEW: Final = 0.25
_SHARE_BESIDE_MANY: Final = 0.5
_FEW_STREAMS: Final = 8
_MANY_STREAMS: Final = 16
# Of prompts beside few in any step, unless that is less than the step takes anyway; and what is taken at least.
_LONGEST_S: Final = 0.08
_LEAST_EFFORT: Final = 32.0
_SHARE_ALONE: Final = 2.0  # the same for a prompt beside which there is nothing, so that it runs in few steps
_SHARE_OF_FIRST: Final = 0.5  # of what prompts may take, for the one that came first, while others wait

_COPIED: Final = 0.02  # what a virtual token costs that is only copied into the cache, in tokens that run
_SINGLE: Final = 8.0  # what a token costs besides that layers with a state run by itself, in tokens that run together
_SCORED: Final = 3.0  # what a token costs whose logits are wanted and looked through, in tokens that run for the cache


@dataclass(frozen=True, slots=True)
class PromptCost:
    """What a token of a prompt costs at its position, where one without any before it costs 1.

    `positions`: so many to look back at in every layer cost as much as all the rest. `windows`: how far each layer
    looks back at most, 0 for all.
    """

    positions: float = float("inf")
    windows: tuple[int, ...] = (0,)

    def at(self, position: int) -> float:
        seen = sum(min(position, window) if window else position for window in self.windows)
        return 1.0 + seen / len(self.windows) / self.positions


def _share_beside(num_streams: int) -> float:
    part = (num_streams - _FEW_STREAMS) / (_MANY_STREAMS - _FEW_STREAMS)
    return _SHARE_BESIDE_FEW + (_SHARE_BESIDE_MANY - _SHARE_BESIDE_FEW) * min(1.0, max(0.0, part))


class Pace:
    """How long steps beside few streams take, from the last ones: a machine has slower times, and slower models."""

    def __init__(self) -> None:
        self._without_s = 0.0
        self._for_effort_s = 0.0

    def saw(self, effort: float, seconds: float) -> None:
        """A step took so long, prompts having taken so much effort in it."""
        if not effort:
            self._without_s = seconds if not self._without_s else (self._without_s + seconds) / 2
        elif effort >= _LEAST_EFFORT / 2:  # of less, most is not in proportion
            seen = max(0.0, seconds - self._without_s) / effort
            self._for_effort_s = seen if not self._for_effort_s else (self._for_effort_s + seen) / 2

    @property
    def most_effort(self) -> float:
        """What prompts may take in the next step; any, while nothing was seen."""
        if not self._for_effort_s:
            return float("inf")
        return max(_LEAST_EFFORT, max(_LONGEST_S, self._without_s) / self._for_effort_s)


def is_few(num_streams: int) -> bool:
    """Whether a step beside so many is short enough without prompts that what prompts take is felt."""
    return 0 < num_streams < _MANY_STREAMS


@dataclass(slots=True)
class Room:
    """What a step may still take: tokens, and among them prompt tokens whose logits are wanted.

    `effort` is what prompts may take, in tokens at the beginning of one; `kept` is the part of it that is the first's.
    `pieces`: what a prompt's part has to be made of, if of something: then the `kept_tokens` of the first's next piece
    are its, too, and the `kept_logits` wanted of them, as what others leave of a step may be less than a piece.
    """

    tokens: int
    prompt_logits: int
    cost: PromptCost
    pieces: Pieces | None = None
    effort: float = field(init=False)
    kept: float = field(init=False, default=0.0)
    kept_tokens: int = field(init=False, default=0)
    kept_logits: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.effort = float(self.tokens)

    def begin_prompts(
        self, num_streams: int, first: SequenceOf[Sequence], *, num_others: int, pace: Pace | None = None
    ) -> None:
        """All that goes on by a token has taken its share. `first` has the prompt that came first, if there is one.

        `num_others` prompts wait besides. While more wait for a first token than for their next one, prompts have
        their whole share: kept short, steps would admit fewer than leave, and on a slow machine the batch would shrink.
        """
        if num_streams:
            self.effort = min(self.tokens, max(1.0, (self.tokens + num_streams) * _share_beside(num_streams)))
            if pace is not None and is_few(num_streams) and len(first) + num_others <= num_streams:
                self.effort = min(self.effort, pace.most_effort)
        elif first and not num_others:
            self.effort *= _SHARE_ALONE
        for seq in first if num_others else ():
            self.kept = min(self.effort * _SHARE_OF_FIRST, seq.num_uncomputed * self._cost_of(seq, seq.num_tokens))
            if self.pieces is not None:
                self.kept_tokens = self.pieces.first_of(seq)
                self.kept_logits = self.kept_tokens if seq.scores_prompt else 0

    def open_kept(self) -> None:
        """Now it is the first's turn."""
        self.kept, self.kept_tokens, self.kept_logits = 0.0, 0, 0

    @property
    def has_any(self) -> bool:
        """Another prompt can have a token."""
        return self.tokens - self.kept_tokens > 0 and self.effort - self.kept > 0

    def fits(self, seq: Sequence, num_copied: int = 0) -> int:
        """How many of the sequence's tokens; of one that wants more than there is, one at least while there is any.

        The next `num_copied` of them are virtual ones that need not run.
        """
        first = seq.num_computed + num_copied
        most = self.tokens - self.kept_tokens
        count = min(seq.num_uncomputed - num_copied, most)
        if self.pieces is not None:
            count = min(count, self.pieces.num_alike(seq))
        if count > 1:
            effort = self.effort - self.kept
            middle = first + int(min(count, effort)) // 2
            count = min(count, int(effort / self._cost_of(seq, middle)) or int(effort > 0))
        if seq.wants_prompt_logits and seq.scores_prompt:
            most = min(most, max(0, -first) + self.prompt_logits - self.kept_logits)
            count = min(count, most)
        if self.pieces is not None and count > 0:
            count = self.pieces.fit(seq, count, most, is_first=not self.kept)
        return num_copied + count if count > 0 else 0

    def _cost_of(self, seq: Sequence, place: int) -> float:
        cost = self.cost.at(seq.num_virtual + place) * (_SCORED if seq.scores_prompt and place >= 0 else 1.0)
        return cost + _SINGLE if self.pieces is not None and self.pieces.runs_singly(seq) else cost

    def take(self, seq: Sequence, count: int, num_copied: int = 0) -> None:
        """So many tokens of the sequence, or with less than 0, so many given back. `num_copied`: as in `fits`."""
        count, first = count - num_copied, seq.num_computed + num_copied
        self.tokens -= count
        if seq.num_uncomputed > 1:
            self.effort -= count * self._cost_of(seq, first + abs(count) // 2) + num_copied * _COPIED
        if seq.wants_prompt_logits and seq.scores_prompt:
            self.prompt_logits -= max(0, count + min(0, first)) if count > 0 else count
