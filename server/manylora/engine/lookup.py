"""Drafts that are looked up: what followed the same tokens before, in the sequence itself or in answers like it.

Prompt lookup (Saxena, "Prompt Lookup Decoding", 2023) over the sequence's own prompt and answer, and over what the same
tenant's last sequences with the same version of an adapter answered: an adapter that was trained on one form of answer
repeats it. How much is drafted follows what was accepted: a pass over few tokens takes little longer than one over a
single token, since the base's weights are read either way, so each token is drafted that is likelier to come than the
pass is worse for it.
"""

from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from manylora.engine.sequence import Sequence

__all__ = ["LookupDrafter"]

TOKENS_OF_A_PASS: Final = 24.0  # as many run in twice the time of a single one; measured on CPUs in bfloat16
LONGEST_MATCH: Final = 8  # tokens that are compared
SHORTEST_MATCH: Final = 2
MOST_TOKENS: Final = 64  # of one draft, whatever is set
WINDOW: Final = 4096  # of the sequence's last tokens that are looked through
MEMORY: Final = 8192  # tokens of answers that are kept of one kind
MOST_KINDS: Final = 512  # of which answers are kept; the longest unused are forgotten
_LED_IN_BY: Final = 4  # of the prompt's last tokens, kept before an answer so that its beginning is found
_LONGEST_PAUSE: Final = 32  # steps for which a sequence is not looked up after it was in vain
_FORGET: Final = 0.9  # how much of what was seen counts after another draft
_END: Final = -1  # between two answers

Ids = npt.NDArray[np.int32]
Kind = tuple[str, str | None, tuple[str, ...]]  # tenant, salt, ids of adapters: nobody else's are looked through


class _Text:
    """Tokens that grow at their end."""

    __slots__ = ("_ids", "num_tokens")

    def __init__(self) -> None:
        self._ids: Ids = np.empty(256, np.int32)
        self.num_tokens = 0

    @property
    def ids(self) -> Ids:
        return self._ids[: self.num_tokens]

    def add(self, tokens: SequenceOf[int]) -> None:
        needed = self.num_tokens + len(tokens)
        if needed > len(self._ids):
            self._ids = np.concatenate([self.ids, np.empty(2 * needed - self.num_tokens, np.int32)])
        self._ids[self.num_tokens : needed] = tokens
        self.num_tokens = needed

    def keep_last(self, count: int) -> None:
        if self.num_tokens > count:
            self._ids = self._ids[self.num_tokens - count : self.num_tokens].copy()
            self.num_tokens = count


@dataclass(slots=True)
class _Rate:
    """How often a drafted token was right; before any was seen, two of three, so that it is tried in batches too."""

    right: float = 0.0
    tried: float = 0.0

    @property
    def value(self) -> float:
        return (self.right + 2) / (self.tried + 3)

    def see(self, num_right: int, num_tried: int) -> None:
        self.right, self.tried = self.right * _FORGET + num_right, self.tried * _FORGET + num_tried


@dataclass(slots=True)
class _Answers:
    """Of one kind: what was answered, and how good matches of each length have been."""

    text: _Text = field(default_factory=_Text)
    rates: dict[int, _Rate] = field(default_factory=dict)

    def rate(self, length: int) -> _Rate:
        return self.rates.setdefault(length, _Rate())


@dataclass(slots=True)
class _State:
    """Of one sequence: its last tokens, `num_followed` of them being known, for how many steps it is not looked up, how
    often in a row that was in vain, and the rate that its last draft counts for.
    """

    text: _Text = field(default_factory=_Text)
    num_followed: int = 0
    pause: int = 0
    num_vain: int = 0
    drafted_by: _Rate | None = None


class LookupDrafter:
    """Proposes what followed before. Lives on the engine's thread."""

    def __init__(self, most: int) -> None:
        """`most`: tokens of one draft."""
        self._most = most
        self._kinds: OrderedDict[Kind, _Answers] = OrderedDict()

    def propose(self, seq: Sequence, most: int, num_rows: int) -> SequenceOf[int]:
        """See `Drafter`."""
        state = seq.drafting
        if state is None:
            state = seq.drafting = _State()
        assert isinstance(state, _State)
        state.drafted_by = None
        if state.pause:
            state.pause -= 1
            return ()
        answers = self._answers(seq)
        self._follow(seq, state)
        length, found = self._found(state, answers)
        rate = answers.rate(length) if length else None
        count = 0 if rate is None else _worth(rate.value, num_rows, min(most, self._most, len(found)))
        if not count:
            if rate is not None:
                rate.see(0, 0)  # what was seen long ago counts less, so that it is tried again
            self._pause(state)
            return ()
        state.drafted_by = rate
        draft: list[int] = found[:count].tolist()
        return draft

    def learn(self, seq: Sequence, num_drafted: int, num_accepted: int) -> None:
        """See `Drafter`."""
        state = seq.drafting
        if not isinstance(state, _State) or state.drafted_by is None:
            return
        state.drafted_by.see(num_accepted, min(num_drafted, num_accepted + 1))
        if num_accepted:
            state.num_vain = 0
        else:
            self._pause(state)

    def keep(self, seq: Sequence) -> None:
        """See `Drafter`."""
        seq.drafting = None
        begin = max(0, seq.num_prompt_tokens - _LED_IN_BY)
        tokens = seq.tokens[max(begin, len(seq.tokens) - MEMORY // 2) :]
        text = self._answers(seq).text
        text.keep_last(MEMORY - len(tokens) - 1)
        text.add([_END, *tokens])

    def _answers(self, seq: Sequence) -> _Answers:
        kind = seq.tenant, seq.cache_salt, seq.mix.ids  # whatever their weights, which are a caller's to choose
        found = self._kinds.get(kind)
        if found is None:
            found = self._kinds[kind] = _Answers()
            if len(self._kinds) > MOST_KINDS:
                self._kinds.popitem(last=False)
        self._kinds.move_to_end(kind)
        return found

    @staticmethod
    def _follow(seq: Sequence, state: _State) -> None:
        state.text.add(seq.tokens[max(state.num_followed, seq.num_tokens - WINDOW) :])
        state.num_followed = seq.num_tokens
        if state.text.num_tokens > 2 * WINDOW:
            state.text.keep_last(WINDOW)

    @staticmethod
    def _found(state: _State, answers: _Answers) -> tuple[int, Ids]:
        """The longest match and what followed it; of equals the sequence's own, and of these the last."""
        own = state.text.ids[-WINDOW:]
        last = own[-LONGEST_MATCH:]
        length, found = _followed(own, last)
        if length < LONGEST_MATCH:
            longer, theirs = _followed(answers.text.ids, last)
            if longer > length:
                length, found = longer, theirs
        ends = np.flatnonzero(found == _END)
        return length, found[: ends[0]] if ends.size else found

    @staticmethod
    def _pause(state: _State) -> None:
        state.num_vain += 1
        state.pause = min(2**state.num_vain, _LONGEST_PAUSE) - 1


def _followed(text: Ids, last: Ids) -> tuple[int, Ids]:
    """How many of the `last` tokens stand together elsewhere in `text`, and what followed there; 0 for too few."""
    places, length = np.flatnonzero(text[:-1] == last[-1]), 1
    while length < len(last):
        nearer = places[places >= length]
        nearer = nearer[text[nearer - length] == last[-1 - length]]
        if not nearer.size:
            break
        places, length = nearer, length + 1
    if not places.size or length < SHORTEST_MATCH:
        return 0, text[:0]
    begin = int(places[-1]) + 1
    return length, text[begin : begin + MOST_TOKENS]


def _worth(rate: float, num_rows: int, most: int) -> int:
    """How many tokens to draft for one of so many rows, `rate` being how likely each is right if those before are.

    Without drafts a pass gives `num_rows` tokens in the time of `TOKENS_OF_A_PASS` and so many more. Another one is
    worth its time where it gives more than that for it.
    """
    least = num_rows / (TOKENS_OF_A_PASS + num_rows)
    count, chance = 0, rate
    while count < most and chance > least:
        count, chance = count + 1, chance * rate
    return count
